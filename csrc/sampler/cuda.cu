// The sampler on an NVIDIA GPU: one launch, one block of 1,024 threads per row, no host read, no allocation.
//
//   window    for top-k or top-p that keep at most 1,024 tokens, which is nearly always. Every thread reads its part of the row and
//             keeps its largest key. The k-th largest of the 1,024 maxima, found with __syncthreads_count, is not above the k-th
//             value. A second read collects the tokens that reach this bound (about 55 at k = 50, 235 at 200) in shared memory. There
//             each candidate counts the strictly greater ones and their mass, which gives rank and nucleus at once, without a sort.
//   search    for anything wider: the same cuts by bisection over the whole row, 32 reads for k and 32 for p. Slow, exact, rare.
//   no filter one read for the maximum, one for the sums of 32 chunks, and one of the chunk that holds the draw.
//
// Masses are summed by shuffles, since 64-bit atomics on shared memory are loops of compare-and-swap. The kernel depends only on
// definition.h and CUDA's own names, so tests/csrc/cuda_on_cpu.h can run this file on the CPU.
#include "sampler/definition.h"
#include "sampler/sampler.h"

namespace ngf {
namespace {

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr uint32_t WINDOW = THREADS;       // candidates: one per thread
constexpr uint32_t NUCLEUS_GUESS = 256;    // top-p alone: tokens among which the nucleus is searched first

struct Shared {
  uint64_t weight[WINDOW];
  uint32_t key[WINDOW];
  uint32_t index[WINDOW];
  uint64_t partial[WARPS];
  uint64_t chunk[WARPS];
  uint64_t draw;
  uint32_t candidates;
};

struct Row {
  float max;
  Filter filter;
};

__device__ __forceinline__ float y_of(const Row& row, float x) { return scaled(x, row.max, row.filter.temperature); }

// ---------------------------------------------------------------- reductions over the block (each is also a barrier)

__device__ uint64_t block_sum(uint64_t value, Shared& s) {
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  if (threadIdx.x % 32 == 0) s.partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = s.partial[threadIdx.x % 32];
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  __syncthreads();  // `partial` may be overwritten now
  return value;
}

__device__ uint32_t block_max(uint32_t value, Shared& s) {
  value = __reduce_max_sync(ALL_LANES, value);
  if (threadIdx.x % 32 == 0) s.partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = __reduce_max_sync(ALL_LANES, (uint32_t)s.partial[threadIdx.x % 32]);
  __syncthreads();
  return value;
}

// The sum over the threads before this one. Only for a kernel's last reduction: no barrier follows its reads of `partial`.
__device__ uint64_t block_sum_before(uint64_t value, Shared& s) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t upto = value;
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint64_t other = __shfl_up_sync(ALL_LANES, upto, distance);
    if (lane >= distance) upto += other;
  }
  if (lane == 31) s.partial[warp] = upto;
  __syncthreads();
  uint64_t before = upto - value;
  for (uint32_t w = 0; w < warp; ++w) before += s.partial[w];
  return before;
}

// ---------------------------------------------------------------- reading the row

// visit(index, value) for x[begin .. end), shared by `step` threads of which this is number `first`; 16 bytes a load, and single
// elements at unaligned ends (a vocabulary that is not a multiple of 8, an odd row stride).
template <class Logit, class Visit>
__device__ __forceinline__ void for_each(const Logit* x, uint32_t begin, uint32_t end, uint32_t first, uint32_t step, Visit visit) {
  constexpr uint32_t N = 16 / sizeof(Logit);
  const uint32_t misaligned = (uint32_t)((uintptr_t)(x + begin) % 16 / sizeof(Logit));
  const uint32_t aligned = min(end, begin + (N - misaligned) % N);
  for (uint32_t i = begin + first; i < aligned; i += step) visit(i, to_float(x[i]));
  const uint32_t vectors = (end - aligned) / N;
#pragma unroll 2
  for (uint32_t v = first; v < vectors; v += step) {
    const uint4 loaded = *((const uint4*)(x + aligned) + v);
    Logit some[N];
    memcpy(some, &loaded, sizeof some);
#pragma unroll
    for (uint32_t j = 0; j < N; ++j) visit(aligned + v * N + j, to_float(some[j]));
  }
  for (uint32_t i = aligned + vectors * N + first; i < end; i += step) visit(i, to_float(x[i]));
}

// ---------------------------------------------------------------- window

// Draws from a window that holds all tokens that the filters keep. False, for all threads, where they do not fit the window.
template <class Logit>
__device__ bool draw_in_window(const Logit* x, uint32_t V, const Row& row, uint32_t thread_max, Shared& s, int64_t* token) {
  const Filter& f = row.filter;
  const uint32_t wanted = f.k ? f.k : NUCLEUS_GUESS;
  if (wanted > WINDOW) return false;
  uint32_t cut = 0;
  if (V > WINDOW) {
    for (uint32_t bit = 1u << 31; bit; bit /= 2) {
      const uint32_t reached = __syncthreads_count(thread_max >= (cut | bit));
      if (reached < wanted) continue;
      cut |= bit;
      if (reached <= wanted + wanted / 8) break;  // close enough: the last bits would cost more than they save
    }
  }
  if (threadIdx.x == 0) s.candidates = 0;
  __syncthreads();
  uint64_t mass = 0;  // of the whole row; needed without top-k
  for_each(x, 0, V, threadIdx.x, THREADS, [&](uint32_t i, float value) {
    const uint32_t key = key_of(value);
    if (!f.k) mass += weight_of(y_of(row, value));
    if (key < cut) return;
    const uint32_t place = atomicAdd(&s.candidates, 1u);
    if (place >= WINDOW) return;
    s.key[place] = key;
    s.index[place] = i;
  });
  __syncthreads();
  const uint32_t n = s.candidates;
  if (n > WINDOW) return false;

  const bool candidate = threadIdx.x < n;
  const uint32_t key = candidate ? s.key[threadIdx.x] : 0, index = candidate ? s.index[threadIdx.x] : 0;
  const float y = y_of(row, value_of(key));
  const uint64_t weight = candidate ? weight_of(y) : 0;
  s.weight[threadIdx.x] = weight;
  __syncthreads();
  uint32_t rank = 0;    // the number of strictly greater candidates
  uint64_t above = 0;   // and their mass
  if (candidate) {
    for (uint32_t j = 0; j < n; ++j) {
      const bool greater = s.key[j] > key;
      rank += greater;
      above += greater ? s.weight[j] : 0;
    }
  }
  bool kept = candidate && (!f.k || rank < f.k);
  if (f.nucleus) {
    const uint64_t nucleus = nucleus_mass(f.p, block_sum(f.k ? (kept ? weight : 0) : mass, s));
    if (!f.k && block_sum(weight, s) < nucleus) return false;
    kept = kept && above < nucleus;
  }
  kept = kept && y >= f.log_min_p;

  const uint64_t share = kept ? weight : 0;
  const uint64_t r = high_product(s.draw, block_sum(share, s));
  s.weight[threadIdx.x] = share;
  __syncthreads();
  if (share) {
    uint64_t start = 0;  // candidates are in no order in the window; intervals are in order of the index
    for (uint32_t j = 0; j < n; ++j) start += s.index[j] < index ? s.weight[j] : 0;
    if (start <= r && r - start < share) *token = index;
  }
  return true;
}

// ---------------------------------------------------------------- search over the row

// The smallest key that top-k and top-p keep.
template <class Logit> __device__ uint32_t search_cut(const Logit* x, uint32_t V, const Row& row, Shared& s) {
  const Filter& f = row.filter;
  uint32_t cut = 0;
  if (f.k) {
    for (uint32_t bit = 1u << 31; bit; bit /= 2) {
      const uint32_t higher = cut | bit;
      uint32_t count = 0;
      for_each(x, 0, V, threadIdx.x, THREADS, [&](uint32_t, float value) { count += key_of(value) >= higher; });
      if (block_sum(count, s) >= f.k) cut = higher;
    }
  }
  if (!f.nucleus) return cut;
  uint64_t wanted = 0;
  uint32_t nucleus_cut = 0;
  // The first round, with no bit, sums the mass that top-k keeps; the others search the largest cut whose mass is at least its share.
  for (uint64_t bit = 1ull << 32; bit; bit /= 2) {
    const uint32_t lowest = wanted ? nucleus_cut | (uint32_t)bit : cut;
    uint64_t mass = 0;
    for_each(x, 0, V, threadIdx.x, THREADS, [&](uint32_t, float value) {
      if (key_of(value) >= lowest) mass += weight_of(y_of(row, value));
    });
    mass = block_sum(mass, s);
    if (!wanted) wanted = nucleus_mass(f.p, mass);
    else if (mass >= wanted) nucleus_cut = lowest;
  }
  return nucleus_cut;
}

// ---------------------------------------------------------------- drawing from the row

// Draws among all tokens not below `cut`: sums 32 chunks, one per warp, then 1,024 pieces of the chunk that holds the draw; one thread
// then searches its piece.
template <class Logit>
__device__ void draw_from_row(const Logit* x, uint32_t V, const Row& row, uint32_t cut, Shared& s, int64_t* token) {
  const auto share = [&](float value) -> uint64_t {
    const float y = y_of(row, value);
    return key_of(value) >= cut && y >= row.filter.log_min_p ? weight_of(y) : 0;
  };
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = (V + WARPS - 1) / WARPS;
  uint64_t mass = 0;
  for_each(x, min(V, warp * size), min(V, warp * size + size), lane, 32, [&](uint32_t, float value) { mass += share(value); });
  for (int distance = 16; distance; distance /= 2) mass += __shfl_xor_sync(ALL_LANES, mass, distance);
  if (lane == 0) s.chunk[warp] = mass;
  __syncthreads();
  uint64_t total = 0;
  for (int w = 0; w < WARPS; ++w) total += s.chunk[w];
  uint64_t rest = high_product(s.draw, total);
  uint32_t chosen = 0;
  for (; rest >= s.chunk[chosen]; ++chosen) rest -= s.chunk[chosen];

  const uint32_t end = min(V, chosen * size + size), piece = (size + THREADS - 1) / THREADS;
  const uint32_t first = min(end, chosen * size + threadIdx.x * piece), last = min(end, first + piece);
  uint64_t own = 0;
  for (uint32_t i = first; i < last; ++i) own += share(to_float(x[i]));
  const uint64_t before = block_sum_before(own, s);
  if (rest < before || rest - before >= own) return;
  rest -= before;
  uint32_t i = first;
  for (uint64_t w; rest >= (w = share(to_float(x[i]))); ++i) rest -= w;
  *token = i;
}

// ---------------------------------------------------------------- the kernel

template <class Logit> __global__ void __launch_bounds__(THREADS) sample_kernel(const Batch batch) {
  __shared__ Shared s;
  const int64_t b = blockIdx.x;
  const uint32_t V = (uint32_t)batch.vocab;
  const Logit* x = (const Logit*)batch.logits + b * batch.row_stride;
  int64_t* token = batch.token + b;
  const float m = at(batch.min_p, b);
  Row row;
  row.filter = make_filter(at(batch.temperature, b), at(batch.top_k, b), at(batch.top_p, b), m, m > 0 ? log((double)m) : 0, V);
  if (threadIdx.x == 0) {
    const uint64_t offset = (uint64_t)batch.offset[b];
    s.draw = philox((uint64_t)batch.seed[b], offset);
    batch.offset[b] = (int64_t)(offset + 1);
  }
  uint32_t thread_max = 0;
  for_each(x, 0, V, threadIdx.x, THREADS, [&](uint32_t, float value) { thread_max = max(thread_max, key_of(value)); });
  const uint32_t top = block_max(thread_max, s);
  if (row.filter.greedy || top <= KEY_NEGATIVE_INFINITY) {
    uint32_t lowest = ALL_LANES;  // the lowest index is the greatest complement
    for_each(x, 0, V, threadIdx.x, THREADS, [&](uint32_t i, float value) { lowest = key_of(value) == top ? min(lowest, i) : lowest; });
    lowest = ~block_max(~lowest, s);
    if (threadIdx.x == 0) *token = lowest;
    return;
  }
  row.max = value_of(top);
  uint32_t cut = 0;
  if (row.filter.k || row.filter.nucleus) {
    if (draw_in_window(x, V, row, thread_max, s, token)) return;
    cut = search_cut(x, V, row, s);
  }
  draw_from_row(x, V, row, cut, s, token);
}

}  // namespace
}  // namespace ngf

// ---------------------------------------------------------------- launcher

#ifdef __CUDACC__
#include "on_device.h"

namespace ngf {

void sample_cuda(const Batch& batch, int device, void* stream) {
  if (batch.rows == 0) return;
  const OnDevice here(device);
  const dim3 grid((unsigned)batch.rows);
  const cudaStream_t queue = (cudaStream_t)stream;
  switch (batch.type) {
    case LogitType::fp32: sample_kernel<float><<<grid, THREADS, 0, queue>>>(batch); break;
    case LogitType::bf16: sample_kernel<bf16><<<grid, THREADS, 0, queue>>>(batch); break;
    case LogitType::fp16: sample_kernel<fp16><<<grid, THREADS, 0, queue>>>(batch); break;
  }
  check(cudaGetLastError(), "launching the sampler");
}

// Checks what a launch needs: a driver that is new enough, the device, and code for its architecture in this build.
const char* cuda_why_not(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && device >= count) error = cudaErrorInvalidDevice;
  if (error == cudaSuccess) {
    int before = 0;
    cudaFuncAttributes attributes;
    error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, sample_kernel<float>);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // clears the error, if there was one
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace ngf
#endif
