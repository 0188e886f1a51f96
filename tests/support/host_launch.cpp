// One translation unit of kernels, run by the GPU for tests: -DKERNEL_SOURCE names the .cu file.
#include "host_cuda.h"

#define KV_INLINE static inline __attribute__((unused))

#include KERNEL_SOURCE

extern "C" void host_launch(void (*kernel)(const Batch), unsigned grid, const Batch *batch) {
    host_cuda::launch(grid, KV_THREADS, [=] { kernel(*batch); });
}
