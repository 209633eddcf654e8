// RMSNorm for NVIDIA GPUs, forward and backward. Read from the top: the kernels, their launches, the bindings. rmsnorm_build.py builds this when it is first used.
//
//   forward    s = x + a                        the residual sum, where there is an a
//              r = 1 / sqrt(mean(s^2) + eps)    a number a row, kept for the backward
//              y = s * r * weight
//   backward   g = dy * weight,  n = s * r
//              dx = r * (g - n * mean(g * n)) + ds
//              dweight = sum of dy * n over the rows
//
// (Zhang & Sennrich 2019.) There is next to no arithmetic here: the time is that of moving the bytes. So every number is read from memory once and written
// once, 16 bytes a thread at a time, in float32 in between, rounded once at the end:
//
//   - A thread takes chunks of N numbers: chunk threadIdx.x of its row, then the one blockDim.x further, and so on. Neighbours in a warp read neighbours in memory.
//   - The first chunks of each thread wait in registers while the row is summed. Only what is longer than a block keeps is read again, mostly from cache.
//   - A row belongs to blockDim.x threads: a few lanes of a warp, a warp, or a block. Short rows share a block: blockDim.y of them.
//   - Sums have a fixed order and nothing is added atomically, so two runs are equal to the bit.
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define UNROLL _Pragma("unroll")          // so that arrays with k for an index are registers
#define ONE_BY_ONE _Pragma("unroll 1")
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif  // else a stand-in for CUDA was included before: tests/cuda_on_host.h

namespace {

// A thread keeps as many chunks as fit in its registers without spilling: an SM has 65,536 for the threads that are on it.
constexpr int FORWARD_THREADS = 1024, FORWARD_KEEP = 4;   // 64 registers; in bfloat16 a warp keeps a row of 1,024 numbers, a block one of 32,768
constexpr int BACKWARD_THREADS = 512;  // 128 registers: x and dy of two rows, dweight
template <int N> constexpr int BACKWARD_KEEP = N == 1 ? 4 : 16 / N;  // 16 numbers, so that a block keeps a row of 8,192

// ---------------------------------------------------------------------------------------------------------------------
// Numbers and chunks

template <typename T> __device__ __forceinline__ float from_bits(uint32_t bits);
template <> __device__ __forceinline__ float from_bits<float>(uint32_t bits) { return __uint_as_float(bits); }
template <> __device__ __forceinline__ float from_bits<__half>(uint32_t bits) { return __half2float(__ushort_as_half(bits)); }
template <> __device__ __forceinline__ float from_bits<__nv_bfloat16>(uint32_t bits) { return __uint_as_float(bits << 16); }

template <typename T> __device__ __forceinline__ uint32_t to_bits(float x);  // rounded to T
template <> __device__ __forceinline__ uint32_t to_bits<float>(float x) { return __float_as_uint(x); }
template <> __device__ __forceinline__ uint32_t to_bits<__half>(float x) { return __half_as_ushort(__float2half_rn(x)); }
template <> __device__ __forceinline__ uint32_t to_bits<__nv_bfloat16>(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// N numbers in words, because the compiler gives each element of an array of 16-bit numbers a 32-bit register. The alignment lets it move 16 bytes at a time.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Chunk {
  using Word = std::conditional_t<N * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  static constexpr int PER_WORD = sizeof(Word) / sizeof(T);
  Word words[N / PER_WORD];

  __device__ __forceinline__ float get(int j) const { return from_bits<T>(words[j / PER_WORD] >> (j % PER_WORD * 16) & (sizeof(T) == 2 ? 0xffff : ~0u)); }
  __device__ __forceinline__ void set(int j, float x) {  // in order: a word starts with its first number
    words[j / PER_WORD] = j % PER_WORD ? words[j / PER_WORD] | to_bits<T>(x) << 16 : to_bits<T>(x);
  }
};

// Chunk c of the row whose first one is chunk `at` of x; zeros, or nothing stored, where the row has no such chunk.
template <int N, typename T>
__device__ __forceinline__ Chunk<T, N> load(const T* x, int64_t at, int c, int chunks) {
  return c < chunks ? reinterpret_cast<const Chunk<T, N>*>(x)[at + c] : Chunk<T, N>{};
}

template <int N, typename T>
__device__ __forceinline__ void store(T* x, int64_t at, int c, int chunks, const Chunk<T, N>& values) {
  if (c < chunks) reinterpret_cast<Chunk<T, N>*>(x)[at + c] = values;
}

template <typename T, typename A, int N>
__device__ __forceinline__ Chunk<T, N> plus(const Chunk<T, N>& x, const Chunk<A, N>& a) {
  Chunk<T, N> out;
  UNROLL for (int j = 0; j < N; ++j) out.set(j, x.get(j) + a.get(j));
  return out;
}

template <typename T, int N>
__device__ __forceinline__ float dot(const Chunk<T, N>& x, const Chunk<T, N>& y) {
  float total = 0.0f;
  UNROLL for (int j = 0; j < N; ++j) total += x.get(j) * y.get(j);
  return total;
}

// The sum of v over the blockDim.x threads of a row; each of them gets it, to the same bits.
__device__ __forceinline__ float row_sum(float v) {
  const int width = blockDim.x < 32 ? blockDim.x : 32;
  for (int offset = width / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
  if (blockDim.x <= 32) return v;
  __shared__ float sums[32];  // of the warps, row after row
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, first = threadIdx.y * warps;
  __syncthreads();  // everyone has read the last row's
  if (lane == 0) sums[first + threadIdx.x / 32] = v;
  __syncthreads();
  v = lane < warps ? sums[first + lane] : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
  return v;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward: reads x (rows, dim), and a where it is not null; writes y, inv_rms (rows), and where there is an a, sum

template <typename T, typename A, typename W, int N>
__global__ void __launch_bounds__(FORWARD_THREADS, 1)
forward_kernel(const T* __restrict__ x, const A* __restrict__ a, const W* __restrict__ weight, T* __restrict__ sum, T* __restrict__ y,
               float* __restrict__ inv_rms, int64_t rows, int dim, float eps) {
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < rows; first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y, at = row * (dim / N);
    const int chunks = row < rows ? dim / N : 0;  // threads without a row still take part in the sums of their warp and block
    const int rest = threadIdx.x + FORWARD_KEEP * blockDim.x;
    float squares = 0.0f;

    // Loads stand together, before the first use, so that all are under way at once. Chunks past the end are zeros.
    Chunk<T, N> kept[FORWARD_KEEP];
    UNROLL for (int k = 0; k < FORWARD_KEEP; ++k) kept[k] = load<N>(x, at, threadIdx.x + k * blockDim.x, chunks);
    if (a) {
      Chunk<A, N> added[FORWARD_KEEP];
      UNROLL for (int k = 0; k < FORWARD_KEEP; ++k) added[k] = load<N>(a, at, threadIdx.x + k * blockDim.x, chunks);
      UNROLL for (int k = 0; k < FORWARD_KEEP; ++k) {
        kept[k] = plus(kept[k], added[k]);
        store<N>(sum, at, threadIdx.x + k * blockDim.x, chunks, kept[k]);
      }
    }
    UNROLL for (int k = 0; k < FORWARD_KEEP; ++k) squares += dot(kept[k], kept[k]);
    auto summed = [&](int c) {
      const Chunk<T, N> values = load<N>(x, at, c, chunks);
      return a ? plus(values, load<N>(a, at, c, chunks)) : values;
    };
    ONE_BY_ONE for (int c = rest; c < chunks; c += blockDim.x) {
      const Chunk<T, N> values = summed(c);
      if (a) store<N>(sum, at, c, chunks, values);
      squares += dot(values, values);
    }

    const float r = rsqrtf(row_sum(squares) * (1.0f / dim) + eps);
    if (threadIdx.x == 0 && row < rows) inv_rms[row] = r;

    auto normed = [&](const Chunk<T, N>& values, int c) {
      const Chunk<W, N> w = load<N>(weight, 0, c, chunks);
      Chunk<T, N> out;
      UNROLL for (int j = 0; j < N; ++j) out.set(j, values.get(j) * r * w.get(j));
      store<N>(y, at, c, chunks, out);
    };
    UNROLL for (int k = 0; k < FORWARD_KEEP; ++k) normed(kept[k], threadIdx.x + k * blockDim.x);
    ONE_BY_ONE for (int c = rest; c < chunks; c += blockDim.x) normed(summed(c), c);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward, first stage: dx, and each block's part of dweight. Few blocks take all rows between them, so the parts are few.
//
// x is what was normed: the sum, where there was one. ds, its gradient from elsewhere, may be null. partial (gridDim.x, dim) may be null: the weight is
// frozen. A thread adds up the columns of the chunks that it keeps in registers; those of a longer row in its block's part itself.

template <typename T, int N>
struct Row {  // what a thread keeps of a row; zeros past the last one
  float r;
  Chunk<T, N> x[BACKWARD_KEEP<N>], dy[BACKWARD_KEEP<N>];
};

template <typename T, typename W, int N>
__global__ void __launch_bounds__(BACKWARD_THREADS, 1)
backward_kernel(const T* __restrict__ dy, const T* __restrict__ ds, const T* __restrict__ x, const W* __restrict__ weight,
                const float* __restrict__ inv_rms, T* __restrict__ dx, float* __restrict__ partial, int64_t rows, int dim) {
  constexpr int KEEP = BACKWARD_KEEP<N>;
  const int rest = threadIdx.x + KEEP * blockDim.x;
  float dw[KEEP][N] = {};
  float* part = partial ? partial + int64_t(blockIdx.x) * dim : nullptr;
  if (partial)
    for (int c = rest; c < dim / N; c += blockDim.x)
      for (int j = 0; j < N; ++j) part[c * N + j] = 0.0f;

  auto fetch = [&](int64_t number) {
    const int64_t at = number * (dim / N);
    const int chunks = number < rows ? dim / N : 0;
    Row<T, N> row;
    row.r = number < rows ? inv_rms[number] : 0.0f;
    UNROLL for (int k = 0; k < KEEP; ++k) row.x[k] = load<N>(x, at, threadIdx.x + k * blockDim.x, chunks);
    UNROLL for (int k = 0; k < KEEP; ++k) row.dy[k] = load<N>(dy, at, threadIdx.x + k * blockDim.x, chunks);
    return row;
  };
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  int64_t number = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  Row<T, N> row = fetch(number);
  for (; number - threadIdx.y < rows; number += step) {
    const int64_t at = number * (dim / N);           // computed anew: kept in a Row, float32 would spill
    const int chunks = number < rows ? dim / N : 0;  // threads without a row still take part in the sums of their warp and block
    const Row<T, N> next = fetch(number + step);     // on its way while this row is summed, or the memory would rest meanwhile
    Chunk<T, N> kept_ds[KEEP] = {};
    if (ds) {
      UNROLL for (int k = 0; k < KEEP; ++k) kept_ds[k] = load<N>(ds, at, threadIdx.x + k * blockDim.x, chunks);
    }

    float products = 0.0f;
    auto product = [&](const Chunk<T, N>& values, const Chunk<T, N>& grads, int c) {
      const Chunk<W, N> w = load<N>(weight, 0, c, chunks);
      UNROLL for (int j = 0; j < N; ++j) products += grads.get(j) * w.get(j) * values.get(j);
    };
    UNROLL for (int k = 0; k < KEEP; ++k) product(row.x[k], row.dy[k], threadIdx.x + k * blockDim.x);
    ONE_BY_ONE for (int c = rest; c < chunks; c += blockDim.x) product(load<N>(x, at, c, chunks), load<N>(dy, at, c, chunks), c);

    const float mean = row_sum(products) * row.r * (1.0f / dim);
    const float share = row.r * row.r * mean;  // dx = r * dy * weight - x * r^2 * mean, in the fewest operations: next to memory they count

    auto gradient = [&](const Chunk<T, N>& values, const Chunk<T, N>& grads, const Chunk<T, N>& more, float* columns, int c) {
      const Chunk<W, N> w = load<N>(weight, 0, c, chunks);
      Chunk<T, N> out;
      UNROLL for (int j = 0; j < N; ++j) {
        const float g = grads.get(j) * row.r;
        columns[j] += g * values.get(j);
        out.set(j, g * w.get(j) + (more.get(j) - values.get(j) * share));
      }
      store<N>(dx, at, c, chunks, out);
    };
    UNROLL for (int k = 0; k < KEEP; ++k) gradient(row.x[k], row.dy[k], kept_ds[k], dw[k], threadIdx.x + k * blockDim.x);
    ONE_BY_ONE for (int c = rest; c < chunks; c += blockDim.x) {
      float columns[N] = {};
      gradient(load<N>(x, at, c, chunks), load<N>(dy, at, c, chunks), ds ? load<N>(ds, at, c, chunks) : Chunk<T, N>{}, columns, c);
      if (partial)
        for (int j = 0; j < N; ++j) part[c * N + j] += columns[j];
    }
    row = next;
  }
  if (!partial) return;

  DYNAMIC_SHARED(float, shared);  // (blockDim.y, dim) where several rows share the block; at most 128 x 16 numbers
  float* columns = blockDim.y > 1 ? shared + threadIdx.y * dim : part;
  UNROLL for (int k = 0; k < KEEP; ++k)
    if (const int c = threadIdx.x + k * blockDim.x; c < dim / N)
      for (int j = 0; j < N; ++j) columns[c * N + j] = dw[k][j];
  if (blockDim.y > 1) {
    __syncthreads();
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < dim; i += blockDim.x * blockDim.y) {
      float total = 0.0f;
      for (unsigned k = 0; k < blockDim.y; ++k) total += shared[k * dim + i];
      part[i] = total;
    }
  }
}

// Second stage: adds up the blocks' parts. A block of 32 x 32 threads takes 32 columns; each of its rows of threads every 32nd part.

template <typename W>
__global__ void __launch_bounds__(1024)
weight_kernel(const float* __restrict__ partial, W* __restrict__ dweight, int parts, int dim) {
  __shared__ float sums[32][32];
  const int i = blockIdx.x * 32 + threadIdx.x;
  float total = 0.0f;
  if (i < dim)
    for (int part = threadIdx.y; part < parts; part += 32) total += partial[int64_t(part) * dim + i];
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && i < dim) {
    for (int k = 1; k < 32; ++k) total += sums[k][threadIdx.x];
    Chunk<W, 1> out;
    out.set(0, total);
    store<1>(dweight, 0, i, dim, out);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches. All return null, or what went wrong.

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int attribute(cudaDeviceAttr which) {  // of the current device
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

// (threads a row, rows a block): a chunk a thread up to a warp, then up to `keep` chunks a thread, then more warps; at least 96 threads a block.
dim3 block_for(int chunks, int keep, int most) {
  int threads = 1;
  while (threads < 32 && threads < chunks) threads *= 2;
  if (threads * keep < chunks) threads = (chunks + 32 * keep - 1) / (32 * keep) * 32;
  if (threads > most) threads = most;
  return dim3(threads, threads < 128 ? 128 / threads : 1);
}

int64_t blocks_for(int64_t rows, dim3 block, int64_t most) {
  const int64_t blocks = (rows + block.y - 1) / block.y;
  return blocks < most ? blocks : most;
}

template <typename... P>
bool aligned(P*... pointers) {  // to 16 bytes; a null pointer is
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

template <typename T, typename A, typename W, int N>
const char* launch_forward(const void* x, const void* a, const void* weight, void* sum, void* y, float* inv_rms, int64_t rows, int dim, float eps,
                           void* stream) {
  const dim3 block = block_for(dim / N, FORWARD_KEEP, FORWARD_THREADS);
  const unsigned grid = blocks_for(rows, block, INT32_MAX);
  auto kernel = forward_kernel<T, A, W, N>;
  LAUNCH(kernel, grid, block, 0, stream, static_cast<const T*>(x), static_cast<const A*>(a), static_cast<const W*>(weight), static_cast<T*>(sum),
         static_cast<T*>(y), inv_rms, rows, dim, eps);
  return launch_error();
}

// Blocks of 128 threads that the SMs hold at once. There are never more parts, and no second wave of blocks.
int64_t most_parts() { return BACKWARD_THREADS / 128 * int64_t(attribute(cudaDevAttrMultiProcessorCount)); }

template <typename T, typename W, int N>
const char* launch_backward(const void* dy, const void* ds, const void* x, const void* weight, const float* inv_rms, void* dx, float* partial,
                            void* dweight, int64_t rows, int dim, void* stream) {
  const dim3 block = block_for(dim / N, BACKWARD_KEEP<N>, BACKWARD_THREADS);
  const int64_t parts = most_parts(), threads = block.x * block.y;
  const unsigned grid = blocks_for(rows, block, threads < 128 ? parts : parts * 128 / threads);
  const int shared = partial && block.y > 1 ? block.y * dim * sizeof(float) : 0;
  auto first = backward_kernel<T, W, N>;
  if (grid > 0)
    LAUNCH(first, grid, block, shared, stream, static_cast<const T*>(dy), static_cast<const T*>(ds), static_cast<const T*>(x),
           static_cast<const W*>(weight), inv_rms, static_cast<T*>(dx), partial, rows, dim);
  auto second = weight_kernel<W>;
  if (partial) LAUNCH(second, (dim + 31) / 32, dim3(32, 32), 0, stream, partial, static_cast<W*>(dweight), int(grid), dim);
  return launch_error();
}

}  // namespace

// From dtypes to types. x, sum, y, their gradients and inputs are T; a is T or, beside a float32 x, shorter; the weight is T or float32.

enum Dtype { FLOAT32, FLOAT16, BFLOAT16 };

#define FORWARD(T, A, W, x_dtype, a_dtype, w_dtype)                                                                            \
  if (x_type == x_dtype && a_type == a_dtype && w_type == w_dtype)                                                             \
    return dim % (16 / sizeof(T)) == 0 && aligned(x, a, weight, sum, y)                                                        \
               ? launch_forward<T, A, W, 16 / sizeof(T)>(x, a, weight, sum, y, inv_rms, rows, dim, eps, stream)                \
               : launch_forward<T, A, W, 1>(x, a, weight, sum, y, inv_rms, rows, dim, eps, stream);

extern "C" const char* rmsnorm_forward(const void* x, const void* a, const void* weight, void* sum, void* y, float* inv_rms, int64_t rows, int dim,
                                       float eps, int x_type, int a_type, int w_type, void* stream) {
  if (rows == 0) return nullptr;
  FORWARD(float, float, float, FLOAT32, FLOAT32, FLOAT32)
  FORWARD(float, __half, float, FLOAT32, FLOAT16, FLOAT32)
  FORWARD(float, __nv_bfloat16, float, FLOAT32, BFLOAT16, FLOAT32)
  FORWARD(__half, __half, __half, FLOAT16, FLOAT16, FLOAT16)
  FORWARD(__half, __half, float, FLOAT16, FLOAT16, FLOAT32)
  FORWARD(__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, BFLOAT16, BFLOAT16, BFLOAT16)
  FORWARD(__nv_bfloat16, __nv_bfloat16, float, BFLOAT16, BFLOAT16, FLOAT32)
  return "these dtypes do not go together";
}

#define BACKWARD(T, W, x_dtype, w_dtype)                                                                                       \
  if (x_type == x_dtype && w_type == w_dtype)                                                                                  \
    return dim % (16 / sizeof(T)) == 0 && aligned(dy, ds, x, weight, dx)                                                       \
               ? launch_backward<T, W, 16 / sizeof(T)>(dy, ds, x, weight, inv_rms, dx, partial, dweight, rows, dim, stream)    \
               : launch_backward<T, W, 1>(dy, ds, x, weight, inv_rms, dx, partial, dweight, rows, dim, stream);

extern "C" const char* rmsnorm_backward(const void* dy, const void* ds, const void* x, const void* weight, const float* inv_rms, void* dx,
                                        float* partial, void* dweight, int64_t rows, int dim, int x_type, int w_type, void* stream) {
  BACKWARD(float, float, FLOAT32, FLOAT32)
  BACKWARD(__half, __half, FLOAT16, FLOAT16)
  BACKWARD(__half, float, FLOAT16, FLOAT32)
  BACKWARD(__nv_bfloat16, __nv_bfloat16, BFLOAT16, BFLOAT16)
  BACKWARD(__nv_bfloat16, float, BFLOAT16, FLOAT32)
  return "these dtypes do not go together";
}

// Rows of `partial` that a backward pass may need: an upper bound, and not 0, since null means that nobody wants them.
extern "C" int64_t rmsnorm_parts(int64_t rows) {
  const int64_t most = most_parts();
  return rows < 1 ? 1 : rows < most ? rows : most;
}

// ---------------------------------------------------------------------------------------------------------------------
// Bindings, on LibTorch's stable ABI: one object serves torch 2.11 and later. rmsnorm_build.py says to torch what the outputs look like, rmsnorm.py which op is whose gradient.

#ifndef RMSNORM_KERNELS_ONLY
#define TORCH_TARGET_VERSION 0x020b000000000000
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef __CUDACC__
#define DEVICE CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);  // declared there only where USE_CUDA is defined

struct Current {  // makes the tensor's device the current one, and knows its stream
  explicit Current(const Tensor& x) : guard(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#else
#define DEVICE CPU  // the kernels on the stand-in
struct Current {
  explicit Current(const Tensor&) {}
  void* stream = nullptr;
};
#endif

namespace {

// Tensors come contiguous, of one device, and of shapes and dtypes that belong together: rmsnorm.py sees to it. An exception from here ended the process
// on a GPU with torch 2.11; what is left of them is for a launch that fails.
int dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return FLOAT32;
    case ScalarType::Half: return FLOAT16;
    case ScalarType::BFloat16: return BFLOAT16;
    default: return -1;  // the launch says that it does not go with the others
  }
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "rms_norm: ", error); }

// On x's device, by the C shim: torch::stable::empty_like looks an operator up by its name, for 2 us of the host's time.
Tensor empty(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type, x.get_device_index(), &handle));
  return Tensor(handle);
}

int32_t type_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

Tensor empty_like(const Tensor& x) { return empty(x, x.sizes(), type_of(x)); }

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int dim = int(weight.size(0));
  Tensor y = empty_like(x), inv_rms = empty(x, {x.numel() / dim}, aoti_torch_dtype_float32());
  Current current(x);
  check(rmsnorm_forward(x.data_ptr(), nullptr, weight.data_ptr(), nullptr, y.data_ptr(), static_cast<float*>(inv_rms.data_ptr()), x.numel() / dim, dim,
                        float(eps), dtype_of(x), dtype_of(x), dtype_of(weight), current.stream));
  return {y, inv_rms};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& a, const Tensor& weight, double eps) {
  const int dim = int(weight.size(0));
  Tensor sum = empty_like(x), y = empty_like(x), inv_rms = empty(x, {x.numel() / dim}, aoti_torch_dtype_float32());
  Current current(x);
  check(rmsnorm_forward(x.data_ptr(), a.data_ptr(), weight.data_ptr(), sum.data_ptr(), y.data_ptr(), static_cast<float*>(inv_rms.data_ptr()),
                        x.numel() / dim, dim, float(eps), dtype_of(x), dtype_of(a), dtype_of(weight), current.stream));
  return {sum, y, inv_rms};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const std::optional<Tensor>& ds, const Tensor& x, const Tensor& weight,
                                             const Tensor& inv_rms, bool weight_grad) {
  const int dim = int(weight.size(0));
  const int64_t rows = x.numel() / dim;
  Current current(x);  // before rmsnorm_parts, which asks the current device
  Tensor dx = empty_like(x), dweight = empty(weight, {weight_grad ? dim : 0}, type_of(weight));
  Tensor partial = empty(x, {weight_grad ? rmsnorm_parts(rows) * dim : 0}, aoti_torch_dtype_float32());
  check(rmsnorm_backward(dy.data_ptr(), ds ? ds->data_ptr() : nullptr, x.data_ptr(), weight.data_ptr(), static_cast<const float*>(inv_rms.data_ptr()),
                         dx.data_ptr(), weight_grad ? static_cast<float*>(partial.data_ptr()) : nullptr, dweight.data_ptr(), rows, dim, dtype_of(x),
                         dtype_of(weight), current.stream));
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY(tinylm, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor inv_rms)");
  m.def("add_rms_norm(Tensor x, Tensor a, Tensor weight, float eps) -> (Tensor sum, Tensor y, Tensor inv_rms)");
  m.def("rms_norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor inv_rms, bool weight_grad) -> (Tensor dx, Tensor dweight)");
}

#define IMPLEMENT(device) STABLE_TORCH_LIBRARY_IMPL(tinylm, device, m)
IMPLEMENT(DEVICE) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
#endif  // RMSNORM_KERNELS_ONLY
