// RMSNorm over the full width and SA-3D RoPE of queries and keys, forward and backward, one pass over memory each.
//
// A block works on one token of one side (queries or keys); blockIdx.y is the side. Its threads hold the row in registers
// between the sum of squares and the rotation, so that global memory is read once. The first threads make the cosines
// and sines of the token, which all heads share. Angles are those of bernini/rope/reference.py; no table of them exists.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kMaxPairs = 64;

// ---- vectors of 16 bytes ------------------------------------------------------------------------------------------

template <typename T>
constexpr int kLanes = 16 / sizeof(T);  // elements of a vector

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <typename T>
struct alignas(16) Vector {
  T at[kLanes<T>];
};

// Rows are read and written once, and are larger than the caches: evict them first.
template <typename T>
__device__ inline Vector<T> stream_in(const T* row, int index) {
  const float4 raw = __ldcs(reinterpret_cast<const float4*>(row) + index);
  return *reinterpret_cast<const Vector<T>*>(&raw);
}

template <typename T>
__device__ inline void stream_out(T* row, int index, const Vector<T>& value) {
  __stcs(reinterpret_cast<float4*>(row) + index, *reinterpret_cast<const float4*>(&value));
}

// Has the compiler unpack a vector anew behind this point, rather than keep what it unpacked before in more registers.
template <typename T>
__device__ inline void keep_packed(Vector<T>& value) {
  int4& raw = *reinterpret_cast<int4*>(&value);
  asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
}

// `kLanes<T>` weights, which may be of another type than the rows; every block reads them again, from the cache.
template <typename T, typename W>
__device__ inline void load_weights(const W* weights, int index, float (&out)[kLanes<T>]) {
  constexpr int count = kLanes<T> / kLanes<W> > 0 ? kLanes<T> / kLanes<W> : 1;
  const Vector<W>* from = reinterpret_cast<const Vector<W>*>(weights) + index * count;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const Vector<W> part = from[i];
#pragma unroll
    for (int j = 0; j < kLanes<W>; ++j) out[i * kLanes<W> + j] = to_float(part.at[j]);
  }
}

// ---- angles -------------------------------------------------------------------------------------------------------

struct Layout {
  const float* segments;     // [count, 5] rows (token_start, T, H, W, source id)
  const float* frequencies;  // [head_dim / 2, 4] of axis and of source id, in half turns, as two floats each
  int count;
  int offset;  // number of the first token
  int head_dim;
};

// position * frequency in half turns, less whole turns; what that leaves out is added to `rest`.
__device__ inline float half_turns(float position, float high, float low, float& rest) {
  const float product = position * high;
  rest += fmaf(position, high, -product) + position * low;
  return product - 2.0f * rintf(0.5f * product);
}

// The last segment that does not start behind a token. All lanes of a warp have to call: each looks at four segments at
// once, so that up to 128 of them take one round of loads.
__device__ inline int segment_of(const Layout& layout, int token) {
  constexpr int looks = 4;
  const int lane = threadIdx.x % kWarp;
  int first = 0;
  for (int count = layout.count; count > 1;) {
    const int step = (count + looks * kWarp - 1) / (looks * kWarp);
    int begun = 0;
#pragma unroll
    for (int i = 0; i < looks; ++i) {
      const int ahead = (i * kWarp + lane) * step;
      const bool own = ahead < count && static_cast<int>(layout.segments[5 * (first + ahead)]) <= token;
      begun += __popc(__ballot_sync(0xffffffffu, own));
    }
    const int behind = max(begun - 1, 0) * step;
    first += behind;
    count = min(step, count - behind);
  }
  return first;
}

// Cosine and sine of a pair of a token in a segment.
__device__ inline float2 rotation(const Layout& layout, int token, int first, int pair) {
  const float* segment = layout.segments + 5 * first;
  const int local = token - static_cast<int>(segment[0]);
  const int height = static_cast<int>(segment[2]), width = static_cast<int>(segment[3]);
  const int side = layout.head_dim / 6, time = layout.head_dim / 2 - 2 * side;  // pairs of h and of w each, and of t
  const int row = local / width;
  const int position = pair < time ? row / height : pair < time + side ? row % height : local % width;

  const float4 frequency = reinterpret_cast<const float4*>(layout.frequencies)[pair];
  float rest = 0.0f;
  const float along = half_turns(static_cast<float>(position), frequency.x, frequency.y, rest);
  const float phase = half_turns(segment[4], frequency.z, frequency.w, rest);
  float angle = along + phase;
  const float back = angle - along;
  rest += (along - (angle - back)) + (phase - back);  // what the sum rounded away
  angle -= 2.0f * rintf(0.5f * angle);
  float2 out;
  sincospif(angle + rest, &out.y, &out.x);
  return out;
}

__device__ inline void make_rotations(const Layout& layout, int token, float2* rotations) {
  const int pairs = layout.head_dim / 2;
  if (static_cast<int>(threadIdx.x) / kWarp * kWarp >= pairs) return;  // whole warps
  token += layout.offset;
  const int first = segment_of(layout, token);
  for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) rotations[pair] = rotation(layout, token, first, pair);
}

// The rotations of a thread's elements: the same ones in all its vectors, as a block's stride is a multiple of a head.
template <typename T>
__device__ inline void my_rotations(const float2* rotations, int head_dim, float2 (&own)[kLanes<T> / 2]) {
  const int pair = static_cast<int>(threadIdx.x) * kLanes<T> % head_dim / 2;
#pragma unroll
  for (int i = 0; i < kLanes<T> / 2; ++i) own[i] = rotations[pair + i];
}

template <int N>
__device__ inline void rotate(float (&x)[N], const float2 (&by)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * by[i].x - odd * by[i].y;
    x[2 * i + 1] = odd * by[i].x + even * by[i].y;
  }
}

template <int N>
__device__ inline void rotate_back(float (&x)[N], const float2 (&by)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * by[i].x + odd * by[i].y;
    x[2 * i + 1] = odd * by[i].x - even * by[i].y;
  }
}

// By a choice rather than an index: parameters that are indexed at run time move to local memory.
template <typename P>
__device__ inline P of_side(const P (&both)[2]) {
  return blockIdx.y ? both[1] : both[0];
}

// ---- sums over a block --------------------------------------------------------------------------------------------

__device__ inline void warp_sum_into(float value, float* partial) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
}

// After a barrier; every thread adds in the same order.
__device__ inline float sum_of(const float* partial) {
  float sum = 0.0f;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; ++i) sum += partial[i];
  return sum;
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <typename T, typename W>
struct Forward {
  const T* x[2];
  const W* weight[2];  // null: no norm
  T* y[2];
  int64_t stride[2];  // elements from one row of x to the next
  float* rstd;        // [2, tokens]
  int tokens, width;
  float eps;
  bool back;
  Layout layout;
};

template <typename T, typename W, int kVectors>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(const Forward<T, W> args) {
  constexpr int lanes = kLanes<T>;
  __shared__ float2 rotations[kMaxPairs];
  __shared__ float partial[kMaxThreads / kWarp];
  const int token = blockIdx.x, side = blockIdx.y, vectors = args.width / lanes;
  const T* x = of_side(args.x) + token * of_side(args.stride);
  T* y = of_side(args.y) + static_cast<int64_t>(token) * args.width;
  const W* weight = of_side(args.weight);

  Vector<T> raw[kVectors];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < vectors) raw[i] = stream_in(x, at);
  }
  make_rotations(args.layout, token, rotations);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (threadIdx.x + i * blockDim.x < vectors) {
#pragma unroll
      for (int j = 0; j < lanes; ++j) squares = fmaf(to_float(raw[i].at[j]), to_float(raw[i].at[j]), squares);
    }
  }
  warp_sum_into(squares, partial);
  __syncthreads();
  float rstd = 1.0f;
  if (weight) {
    rstd = 1.0f / sqrtf(sum_of(partial) / static_cast<float>(args.width) + args.eps);
    if (threadIdx.x == 0) args.rstd[side * args.tokens + token] = rstd;
  }

  float2 own[lanes / 2];
  my_rotations<T>(rotations, args.layout.head_dim, own);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    float value[lanes];
    if (weight) {
      float scale[lanes];
      load_weights<T, W>(weight, at, scale);
#pragma unroll
      for (int j = 0; j < lanes; ++j) value[j] = to_float(raw[i].at[j]) * rstd * scale[j];
    } else {
#pragma unroll
      for (int j = 0; j < lanes; ++j) value[j] = to_float(raw[i].at[j]);
    }
    if (args.back) {
      rotate_back(value, own);
    } else {
      rotate(value, own);
    }
    Vector<T> out;
#pragma unroll
    for (int j = 0; j < lanes; ++j) out.at[j] = from_float<T>(value[j]);
    stream_out(y, at, out);
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <typename T, typename W>
struct Backward {
  const T* dy[2];
  const T* saved[2];  // the op's inputs or its outputs
  const W* weight[2];
  T* dx[2];
  float* dw;  // [2, blocks, width], a partial sum of each block
  int64_t dy_stride[2], saved_stride[2];
  const float* rstd;  // [2, tokens]
  int tokens, width;
  Layout layout;
};

// Gradient of the weighted row, and the row that was saved, turned back if it is an output: the weighted row itself.
template <typename T, bool kOutputs>
__device__ inline void open(const Vector<T>& dy, const Vector<T>& saved, const float2 (&rotations)[kLanes<T> / 2],
                            float (&g)[kLanes<T>], float (&x)[kLanes<T>]) {
#pragma unroll
  for (int j = 0; j < kLanes<T>; ++j) {
    g[j] = to_float(dy.at[j]);
    x[j] = to_float(saved.at[j]);
  }
  rotate_back(g, rotations);
  if (kOutputs) rotate_back(x, rotations);
}

// A weight of zero leaves nothing of its input in the output.
__device__ inline float inverse(float weight) { return weight == 0.0f ? 0.0f : __fdividef(1.0f, weight); }

// Blocks stay and take token after token, so that each keeps the gradients of its weights in registers. With g the
// gradient of the weighted row and xhat the normalised one, dx = rstd * (w * g - xhat * mean(w * g * xhat)) and
// dw = sum of g * xhat. Registers are few enough for two blocks of the widest rows on a multiprocessor.
template <typename T, typename W, int kVectors, bool kOutputs>
__global__ void __maxnreg__(96) backward_kernel(const Backward<T, W> args) {
  constexpr int lanes = kLanes<T>;
  __shared__ float2 rotations[2][kMaxPairs];
  __shared__ float partial[2][kMaxThreads / kWarp];
  const int side = blockIdx.y, vectors = args.width / lanes;
  const W* weight = of_side(args.weight);

  float sums[kVectors][lanes] = {};  // with outputs, w * dw
  int parity = 0;
  if (static_cast<int>(blockIdx.x) < args.tokens) make_rotations(args.layout, blockIdx.x, rotations[0]);
  __syncthreads();
  for (int token = blockIdx.x; token < args.tokens; token += gridDim.x, parity ^= 1) {
    const T* dy = of_side(args.dy) + token * of_side(args.dy_stride);
    const T* saved = of_side(args.saved) + token * of_side(args.saved_stride);
    Vector<T> raw_dy[kVectors], raw_saved[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at < vectors) {
        raw_dy[i] = stream_in(dy, at);
        raw_saved[i] = stream_in(saved, at);
      }
    }
    const float rstd = args.rstd[side * args.tokens + token];
    float2 own[lanes / 2];
    my_rotations<T>(rotations[parity], args.layout.head_dim, own);
    if (token + static_cast<int>(gridDim.x) < args.tokens) {
      make_rotations(args.layout, token + gridDim.x, rotations[parity ^ 1]);
    }

    float along = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= vectors) continue;
      float g[lanes], x[lanes], scale[lanes];
      open<T, kOutputs>(raw_dy[i], raw_saved[i], own, g, x);
      if (!kOutputs) load_weights<T, W>(weight, at, scale);
#pragma unroll
      for (int j = 0; j < lanes; ++j) {
        if (!kOutputs) x[j] *= rstd;
        sums[i][j] = fmaf(g[j], x[j], sums[i][j]);
        along = fmaf(kOutputs ? g[j] : g[j] * scale[j], x[j], along);
      }
    }
    warp_sum_into(along, partial[parity]);
    __syncthreads();  // the only one: what it orders is kept twice
    const float mean = sum_of(partial[parity]) / static_cast<float>(args.width);

    T* dx = of_side(args.dx) + static_cast<int64_t>(token) * args.width;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= vectors) continue;
      float g[lanes], x[lanes], scale[lanes];
      keep_packed(raw_dy[i]);
      keep_packed(raw_saved[i]);
      open<T, kOutputs>(raw_dy[i], raw_saved[i], own, g, x);
      load_weights<T, W>(weight, at, scale);
      Vector<T> out;
#pragma unroll
      for (int j = 0; j < lanes; ++j) {
        const float xhat = x[j] * (kOutputs ? inverse(scale[j]) : rstd);
        out.at[j] = from_float<T>(rstd * (g[j] * scale[j] - xhat * mean));
      }
      stream_out(dx, at, out);
    }
  }

  float* dw = args.dw + (static_cast<int64_t>(side) * gridDim.x + blockIdx.x) * args.width;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= vectors) continue;
    float scale[lanes];
    if (kOutputs) load_weights<T, W>(weight, at, scale);
#pragma unroll
    for (int j = 0; j < lanes; ++j) dw[at * lanes + j] = kOutputs ? sums[i][j] * inverse(scale[j]) : sums[i][j];
  }
}

// Adds the blocks' partial sums, always in the same order. A block of [kRows, kWarp] threads takes kWarp columns.
constexpr int kRows = 16;

template <typename W>
__global__ void reduce_kernel(const float* partial, W* dw_q, W* dw_k, int blocks, int width) {
  __shared__ float sums[kRows][kWarp + 1];
  const int column = blockIdx.x * kWarp + threadIdx.x, side = blockIdx.y;
  float sum = 0.0f;
  if (column < width) {
    const float* from = partial + static_cast<int64_t>(side) * blocks * width + column;
    for (int row = threadIdx.y; row < blocks; row += kRows) sum += from[static_cast<int64_t>(row) * width];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < width) {
    sum = 0.0f;
    for (int row = 0; row < kRows; ++row) sum += sums[row][threadIdx.x];
    (side ? dw_k : dw_q)[column] = from_float<W>(sum);
  }
}

// ---- host ---------------------------------------------------------------------------------------------------------

// Vectors of a thread, which are enough for rows of 8,192.
template <typename T>
constexpr int kMostVectors = 8192 / kLanes<T> / kMaxThreads;

struct Shape {
  int tokens, width, threads, vectors;
};

template <typename T>
Shape shape_of(const Tensor& x) {
  const int tokens = static_cast<int>(x.size(0)), width = static_cast<int>(x.size(1) * x.size(2));
  const int all = width / kLanes<T>, vectors = all <= 64 ? 1 : kMostVectors<T>;
  const int each = (all + vectors - 1) / vectors;
  return {tokens, width, (each + kWarp - 1) / kWarp * kWarp, vectors};
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "SA-3D RoPE: ", cudaGetErrorString(error)); }

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Layout layout_of(const Tensor& x, const Tensor& segments, const Tensor& frequencies, int64_t offset) {
  return {static_cast<const float*>(segments.data_ptr()), static_cast<const float*>(frequencies.data_ptr()),
          static_cast<int>(segments.size(0)), static_cast<int>(offset), static_cast<int>(x.size(2))};
}

// The tensor itself if its rows can be read in vectors of 16 bytes, else a copy.
Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  bool whole = x.stride(last) == 1;
  if (last > 0) whole = whole && x.stride(1) == x.size(2) && x.stride(0) * x.element_size() % 16 == 0;
  const Tensor rows = whole ? x : torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 ? torch::stable::clone(rows) : rows;
}

std::optional<Tensor> readable(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(readable(*x)) : std::nullopt;
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <typename T, typename W>
void launch_forward(const Forward<T, W>& args, const Shape& shape, cudaStream_t stream) {
  const dim3 grid(shape.tokens, 2);
  auto kernel = shape.vectors == 1 ? forward_kernel<T, W, 1> : forward_kernel<T, W, kMostVectors<T>>;
  kernel<<<grid, shape.threads, 0, stream>>>(args);
  check(cudaGetLastError());
}

template <typename T, typename W>
auto backward_of(int vectors, bool outputs) {
  constexpr int most = kMostVectors<T>;
  if (vectors == 1) return outputs ? backward_kernel<T, W, 1, true> : backward_kernel<T, W, 1, false>;
  return outputs ? backward_kernel<T, W, most, true> : backward_kernel<T, W, most, false>;
}

// Blocks of each side that the device holds at once.
template <typename Kernel>
int resident(Kernel kernel, int threads, int device) {
  int processors = 0, each = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
  return (processors * each + 1) / 2;
}

template <typename Call>
void by_type(ScalarType type, Call&& call) {
  switch (type) {
    case ScalarType::Float:
      return call(float{});
    case ScalarType::Half:
      return call(__half{});
    case ScalarType::BFloat16:
      return call(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, "SA-3D RoPE: rows are float32, float16 or bfloat16");
  }
}

// Weights are of the rows' type or float32.
template <typename T, typename Call>
void by_weight(const std::optional<Tensor>& weight, ScalarType type, Call&& call) {
  if (!weight || weight->scalar_type() == type) return call(T{});
  STD_TORCH_CHECK(weight->scalar_type() == ScalarType::Float, "SA-3D RoPE: weights are of the rows' type or float32");
  call(float{});
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, std::optional<Tensor> weight_q,
                                           std::optional<Tensor> weight_k, Tensor segments, Tensor frequencies,
                                           double eps, int64_t offset, bool back, bool) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = readable(q), k = readable(k), weight_q = readable(weight_q), weight_k = readable(weight_k);
  const int64_t tokens = q.size(0);
  Tensor out_q = torch::stable::new_empty(q, {tokens, q.size(1), q.size(2)});
  Tensor out_k = torch::stable::new_empty(q, {tokens, q.size(1), q.size(2)});
  Tensor rstd = torch::stable::new_empty(q, {2, weight_q ? tokens : 0}, ScalarType::Float);
  if (tokens) {
    by_type(q.scalar_type(), [&](auto element) {
      using T = decltype(element);
      by_weight<T>(weight_q, q.scalar_type(), [&](auto weight) {
        using W = decltype(weight);
        const Shape shape = shape_of<T>(q);
        Forward<T, W> args{{data<T>(q), data<T>(k)},
                           {weight_q ? data<W>(*weight_q) : nullptr, weight_k ? data<W>(*weight_k) : nullptr},
                           {data<T>(out_q), data<T>(out_k)},
                           {q.stride(0), k.stride(0)},
                           data<float>(rstd),
                           shape.tokens,
                           shape.width,
                           static_cast<float>(eps),
                           back,
                           layout_of(q, segments, frequencies, offset)};
        launch_forward(args, shape, stream_of(q));
      });
    });
  }
  return {out_q, out_k, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_q, Tensor grad_k, Tensor saved_q, Tensor saved_k,
                                                    Tensor weight_q, Tensor weight_k, Tensor rstd, Tensor segments,
                                                    Tensor frequencies, int64_t offset, bool outputs) {
  const int device = grad_q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  grad_q = readable(grad_q), grad_k = readable(grad_k), saved_q = readable(saved_q), saved_k = readable(saved_k);
  weight_q = readable(weight_q), weight_k = readable(weight_k);
  const int64_t tokens = grad_q.size(0), width = grad_q.size(1) * grad_q.size(2);
  Tensor dx_q = torch::stable::new_empty(grad_q, {tokens, grad_q.size(1), grad_q.size(2)});
  Tensor dx_k = torch::stable::new_empty(grad_q, {tokens, grad_q.size(1), grad_q.size(2)});
  Tensor dw_q = torch::stable::new_empty(weight_q, {width}), dw_k = torch::stable::new_empty(weight_q, {width});
  by_type(grad_q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    by_weight<T>(weight_q, grad_q.scalar_type(), [&](auto weight) {
      using W = decltype(weight);
      const Shape shape = shape_of<T>(grad_q);
      auto kernel = backward_of<T, W>(shape.vectors, outputs);
      const int most = resident(kernel, shape.threads, device), blocks = tokens < most ? static_cast<int>(tokens) : most;
      Tensor partial = torch::stable::new_empty(grad_q, {2, blocks, width}, ScalarType::Float);
      const Backward<T, W> args{{data<T>(grad_q), data<T>(grad_k)},
                                {data<T>(saved_q), data<T>(saved_k)},
                                {data<W>(weight_q), data<W>(weight_k)},
                                {data<T>(dx_q), data<T>(dx_k)},
                                data<float>(partial),
                                {grad_q.stride(0), grad_k.stride(0)},
                                {saved_q.stride(0), saved_k.stride(0)},
                                data<float>(rstd),
                                shape.tokens,
                                shape.width,
                                layout_of(grad_q, segments, frequencies, offset)};
      const cudaStream_t stream = stream_of(grad_q);
      if (blocks) {
        kernel<<<dim3(blocks, 2), shape.threads, 0, stream>>>(args);
        check(cudaGetLastError());
      }
      const dim3 columns((shape.width + kWarp - 1) / kWarp, 2), threads(kWarp, kRows);
      reduce_kernel<W><<<columns, threads, 0, stream>>>(data<float>(partial), data<W>(dw_q), data<W>(dw_k), blocks,
                                                        shape.width);
      check(cudaGetLastError());
    });
  });
  return {dx_q, dx_k, dw_q, dw_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bernini, CUDA, library) {
  library.impl("sa3d_qk_norm_rope", TORCH_BOX(&forward));
  library.impl("sa3d_qk_norm_rope_backward", TORCH_BOX(&backward));
}
