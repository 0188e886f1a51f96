/* All loops for one width of vectors, and the table by which _codecs.c calls them; it includes this
 * once for each width. */

#include "_codecs_kernel.h"
#include "_codecs_planes.h"
#include "_codecs_heads.h"
#include "_codecs_ranges.h"
#include "_codecs_integers.h"
#include "_codecs_fp8.h"
#include "_codecs_nvfp4.h"
#include "_codecs_hq.h"
#include "_codecs_ecsq.h"

static const kernel NAME(kernel) = {
    .name = KERNEL_NAME,
    .encode =
        {[KV_KEYS] = {[KV_FP8] = NAME(fp8_encode),
                      [KV_INT8] = NAME(int8_keys_encode),
                      [KV_INT4] = NAME(int4_keys_encode),
                      [KV_NVFP4] = NAME(nvfp4_encode),
                      [KV_HQ4] = NAME(hq_encode),
                      [KV_HQ3] = NAME(hq_encode)},
         [KV_VALUES] = {[KV_FP8] = NAME(fp8_encode),
                        [KV_INT8] = NAME(int8_values_encode),
                        [KV_INT4] = NAME(int4_values_encode),
                        [KV_NVFP4] = NAME(nvfp4_encode),
                        [KV_HQ4] = NAME(hq_encode),
                        [KV_HQ3] = NAME(hq_encode)}},
    .decode =
        {[KV_KEYS] = {[KV_FP8] = NAME(fp8_decode),
                      [KV_INT8] = NAME(int8_keys_decode),
                      [KV_INT4] = NAME(int4_keys_decode),
                      [KV_NVFP4] = NAME(nvfp4_decode),
                      [KV_HQ4] = NAME(hq_decode),
                      [KV_HQ3] = NAME(hq_decode)},
         [KV_VALUES] = {[KV_FP8] = NAME(fp8_decode),
                        [KV_INT8] = NAME(int8_values_decode),
                        [KV_INT4] = NAME(int4_values_decode),
                        [KV_NVFP4] = NAME(nvfp4_decode),
                        [KV_HQ4] = NAME(hq_decode),
                        [KV_HQ3] = NAME(hq_decode)}},
    .largest_exponents = NAME(largest_exponents),
    .split_row = NAME(split_row),
    .mark_bytes = NAME(mark_bytes),
    .gather_marked = NAME(gather_marked),
    .scatter_marked = NAME(scatter_marked),
    .below_largest = NAME(below_largest),
    .raise_largest = NAME(raise_largest),
    .split_values = NAME(split_values),
    .merge_values = NAME(merge_values),
    .merge_row = NAME(merge_row),
    .pack_plane = NAME(pack_plane),
    .unpack_plane = NAME(unpack_plane),
    .ecsq_encode = NAME(ecsq_encode),
    .ecsq_decode = NAME(ecsq_decode),
};
