/* A GPU for tests: runs CUDA kernels on the CPU, thread by thread, as the language defines them.
 *
 * Every CUDA thread is a fiber of its own. Barriers and warp collectives are where fibers switch,
 * so a kernel that would hang, or that lets some lanes of a warp miss a collective, is stopped
 * with a message instead; so is one whose threads wait at different barriers. Lanes and warps take
 * their turns forwards and backwards, changing at every barrier and block, so that whoever reads
 * what another thread was to write, with no barrier in between, finds it missing every other time.
 * Memory is ordinary: with AddressSanitizer every access is checked. Blocks run one after the
 * other, which CUDA allows; speed is not the point. What it cannot see: blocks that meet in memory
 * of the device, and what happens within one turn of a thread.
 */
#ifndef KVSTORE_HOST_CUDA_H
#define KVSTORE_HOST_CUDA_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

namespace host_cuda {

enum State { RUNS, AT_WARP, AT_BLOCK, ENDED };
enum { WARP = 32, STACK_BYTES = 64 * 1024 };

struct Fiber {
    ucontext_t context;
    jmp_buf place; /* where it waits: cheaper than a context, which saves signals too */
    std::unique_ptr<char[]> stack;
    State state;
    unsigned posted[2]; /* what this lane gave to a collective; two, so that none is overwritten */
    unsigned turn;
    int barrier; /* the line of the one it waits at */
    bool is_new;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline jmp_buf scheduler_place;
inline unsigned current;
inline std::function<void()> body;
inline dim3 block_index, block_size, grid_size;
inline unsigned turns; /* odd: backwards */

/* Who is the *nth* of *count* to take a turn. */
inline unsigned in_turn(unsigned nth, unsigned count) {
    return turns % 2 == 0 ? nth : count - 1 - nth;
}

inline void stop(const char *why) {
    fprintf(stderr, "host_cuda: block %u thread %u: %s\n", block_index.x, current, why);
    abort();
}

inline void enter() {
    body();
    fibers[current].state = ENDED;
    _longjmp(scheduler_place, 1);
}

inline void wait_as(State state) {
    Fiber &self = fibers[current];
    self.state = state;
    if (_setjmp(self.place) == 0) {
        _longjmp(scheduler_place, 1);
    }
}

inline void run_lane(unsigned lane) {
    current = lane;
    if (_setjmp(scheduler_place) != 0) {
        return;
    }
    if (fibers[lane].is_new) {
        fibers[lane].is_new = false;
        swapcontext(&scheduler, &fibers[lane].context);
    }
    _longjmp(fibers[lane].place, 1);
}

/* Run one warp until every lane has ended or waits for the block. */
inline void run_warp(unsigned first, unsigned end) {
    for (;;) {
        unsigned at_warp = 0, at_block = 0, ended = 0;
        for (unsigned i = 0; i < end - first; i++) {
            unsigned lane = first + in_turn(i, end - first);
            if (fibers[lane].state == RUNS) {
                run_lane(lane);
            }
            at_warp += fibers[lane].state == AT_WARP;
            at_block += fibers[lane].state == AT_BLOCK;
            ended += fibers[lane].state == ENDED;
        }
        if (at_warp == 0) {
            return;
        }
        if (at_block + ended != 0) {
            stop("lanes of one warp wait at different places");
        }
        turns++;
        for (unsigned lane = first; lane < end; lane++) {
            fibers[lane].state = RUNS;
        }
    }
}

inline void start(Fiber &fiber) {
    getcontext(&fiber.context);
    fiber.is_new = true;
    if (!fiber.stack) {
        fiber.stack.reset(new char[STACK_BYTES]);
    }
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    fiber.state = RUNS;
    fiber.turn = 0;
    makecontext(&fiber.context, enter, 0);
}

inline void run_block() {
    unsigned count = block_size.x;
    for (Fiber &fiber : fibers) {
        start(fiber);
    }
    for (;;) {
        unsigned ended = 0;
        turns++;
        for (unsigned i = 0; i < count / WARP; i++) {
            unsigned first = in_turn(i, count / WARP) * WARP;
            unsigned way = turns; /* as many turns as collectives: the order of warps stays */
            run_warp(first, first + WARP);
            turns = way;
        }
        for (unsigned i = 0; i < count; i++) {
            ended += fibers[i].state == ENDED;
        }
        if (ended == count) {
            return;
        }
        if (ended != 0) {
            stop("threads have ended while others wait at a barrier");
        }
        for (unsigned i = 0; i < count; i++) {
            if (fibers[i].barrier != fibers[0].barrier) {
                stop("threads wait at different barriers");
            }
            fibers[i].state = RUNS;
        }
    }
}

inline void launch(unsigned grid, unsigned block, std::function<void()> kernel) {
    if (block % WARP != 0) {
        stop("a block must be whole warps");
    }
    body = kernel;
    grid_size = {grid, 1, 1};
    block_size = {block, 1, 1};
    if (fibers.size() != block) {
        fibers = std::vector<Fiber>(block);
    }
    for (unsigned i = 0; i < grid; i++) {
        block_index = {i, 0, 0};
        run_block();
    }
}

inline void wait_at(int line) {
    fibers[current].barrier = line;
    wait_as(AT_BLOCK);
}

/* Give *value* to the warp and wait until every lane has; then `given(lane)` reads any of them. */
inline unsigned post(unsigned value) {
    Fiber &self = fibers[current];
    unsigned turn = self.turn++ & 1;
    self.posted[turn] = value;
    wait_as(AT_WARP);
    return turn;
}

inline unsigned given(unsigned lane, unsigned turn) {
    return fibers[current / WARP * WARP + lane % WARP].posted[turn];
}

inline dim3 thread_index() { return {current, 0, 0}; }

} // namespace host_cuda

#define threadIdx (host_cuda::thread_index())
#define blockIdx (host_cuda::block_index)
#define blockDim (host_cuda::block_size)
#define gridDim (host_cuda::grid_size)

#define __syncthreads() host_cuda::wait_at(__LINE__)

inline void __syncwarp() { host_cuda::post(0); }

inline unsigned __shfl_sync(unsigned, unsigned value, unsigned lane) {
    return host_cuda::given(lane, host_cuda::post(value));
}

inline unsigned __shfl_xor_sync(unsigned, unsigned value, unsigned mask) {
    unsigned turn = host_cuda::post(value);
    return host_cuda::given((host_cuda::current % host_cuda::WARP) ^ mask, turn);
}

inline unsigned __shfl_up_sync(unsigned, unsigned value, unsigned distance) {
    unsigned turn = host_cuda::post(value), lane = host_cuda::current % host_cuda::WARP;
    return lane < distance ? value : host_cuda::given(lane - distance, turn);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    unsigned turn = host_cuda::post(predicate != 0), votes = 0;
    for (unsigned lane = 0; lane < host_cuda::WARP; lane++) {
        votes |= host_cuda::given(lane, turn) << lane;
    }
    return votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline float atomicAdd(float *at, float value) {
    float before = *at;
    *at += value;
    return before;
}

inline double atomicAdd(double *at, double value) {
    double before = *at;
    *at += value;
    return before;
}

inline unsigned atomicAdd(unsigned *at, unsigned value) {
    unsigned before = *at;
    *at += value;
    return before;
}

inline unsigned atomicOr(unsigned *at, unsigned value) {
    unsigned before = *at;
    *at |= value;
    return before;
}

#endif
