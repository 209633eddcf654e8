// As much of CUDA as rmsnorm_kernel.cu uses, on the processor, for tests alone:
// g++ -x c++ -include cuda_on_host.h rmsnorm_kernel.cu
//
// The threads of a block are fibers of one thread, which run in turn from barrier to barrier: runs are
// deterministic, and switching is quick. Each warp goes as far as it can before the next one starts, in
// ascending or in descending order (cuda_on_host_reverse), so that a missing barrier gives wrong values;
// a barrier that not all threads reach ends the program. Dynamic shared memory is new for each block,
// full of nan, and as large as the launch asks for, so that -fsanitize=address sees its end. It does not
// show lanes of one warp in different shuffles, wrong masks, and what depends on the memory model.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <ucontext.h>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define UNROLL
#define ONE_BY_ONE
#define DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(cuda_on_host::shared)
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuda_on_host::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;

inline float __uint_as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t __float_as_uint(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline __half __ushort_as_half(uint16_t bits) { return __half(bits, __half::from_bits()); }
inline uint16_t __half_as_ushort(__half x) { return x.x; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.x; }
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// A test may set the order of threads, the number of SMs, and the block to begin with, so that the end
// of a huge grid can be run alone.
extern "C" {
inline __attribute__((used, visibility("default"))) int cuda_on_host_reverse = 0;
inline __attribute__((used, visibility("default"))) int cuda_on_host_sms = 1;
inline __attribute__((used, visibility("default"))) int64_t cuda_on_host_first_block = 0;
inline __attribute__((used, visibility("default"))) int64_t cuda_on_host_launches = 0;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cuda_on_host_error = cudaSuccess;
inline cudaError_t cudaGetLastError() {
  cudaError_t error = cuda_on_host_error;
  cuda_on_host_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { *value = cuda_on_host_sms; }

namespace cuda_on_host {

enum State { READY, AT_WARP, AT_BLOCK, DONE };  // where a fiber waits: for its warp, or for its block

struct Fiber {
  State state;
  bool started;
  dim3 index;
  jmp_buf at;
  ucontext_t start;
};

inline Fiber fibers[1024];  // started once, each with a stack for all blocks to come
inline std::vector<char> stacks[1024];
inline int threads;  // of the block
inline std::function<void()> body;
inline jmp_buf scheduler;
inline int current;
inline float exchanged[1024];
inline void* shared;

// The C library's own jump: a checked one (_FORTIFY_SOURCE) refuses to change stacks, and that of
// -fsanitize=address sweeps the stack first, for milliseconds.
inline void jump(jmp_buf to) {
  static const auto longjmp_ =
      reinterpret_cast<void (*)(jmp_buf, int)>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  longjmp_(to, 1);
}

inline void wait(State for_whom) {
  fibers[current].state = for_whom;
  if (!_setjmp(fibers[current].at)) jump(scheduler);
}

inline void enter() {
  while (true) {
    body();
    wait(DONE);
  }
}

inline void resume(int i) {
  Fiber& fiber = fibers[i];
  current = i;
  threadIdx = fiber.index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) jump(fiber.at);
  fiber.started = true;
  stacks[i].resize(64 * 1024);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks[i].data();
  fiber.start.uc_stack.ss_size = stacks[i].size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// Lets fibers [from, to) go on when all of them wait for `state`.
inline bool release(int from, int to, State state) {
  for (int i = from; i < to; ++i)
    if (fibers[i].state != state) return false;
  for (int i = from; i < to; ++i) fibers[i].state = READY;
  return true;
}

inline void run_block() {
  const int n = threads;
  for (int i = 0; i < n; ++i) {
    fibers[i].state = READY;
    fibers[i].index = dim3(i % blockDim.x, i / blockDim.x);
  }
  const int warps = (n + 31) / 32;
  do {
    for (int k = 0; k < warps; ++k) {  // each warp goes as far as it can before the next one starts
      const int warp = cuda_on_host_reverse ? warps - 1 - k : k;
      const int from = 32 * warp;
      const int to = from + 32 < n ? from + 32 : n;
      do {
        for (int j = from; j < to; ++j) {
          const int i = cuda_on_host_reverse ? from + to - 1 - j : j;
          if (fibers[i].state == READY) resume(i);
        }
      } while (release(from, to, AT_WARP));
    }
  } while (release(0, n, AT_BLOCK));
  if (!release(0, n, DONE)) {
    std::fprintf(stderr, "divergent barrier: some threads of the block never reach it\n");
    std::abort();
  }
}

inline void launch(int64_t grid, dim3 block, size_t bytes, std::function<void()> kernel) {
  const int n = block.x * block.y * block.z;
  if (grid < 1 || grid > INT32_MAX || n < 1 || n > 1024 || block.z != 1 || bytes > 48 * 1024) {
    cuda_on_host_error = cudaErrorInvalidConfiguration;
    return;
  }
  ++cuda_on_host_launches;
  gridDim = dim3(grid);
  blockDim = block;
  body = kernel;
  threads = n;
  for (int64_t b = cuda_on_host_first_block; b < grid; ++b) {
    blockIdx = dim3(b);
    shared = std::malloc(bytes);
    std::memset(shared, 0xff, bytes);  // nan
    run_block();
    std::free(shared);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::AT_BLOCK); }

inline float __shfl_xor_sync(uint32_t, float x, int mask) {
  using namespace cuda_on_host;
  const int me = current, other = me ^ mask;
  exchanged[me] = x;
  wait(AT_WARP);
  if (other >= threads) std::abort();  // no such lane
  x = exchanged[other];
  wait(AT_WARP);
  return x;
}
