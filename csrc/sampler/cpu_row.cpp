// Draws from one row on the CPU without sorting it:
//
//   1. One pass takes the largest key of every segment of 32 tokens. The k-th largest of these maxima is not above the k-th largest
//      value, so only segments that reach it can hold a token to keep, and the second pass reads only those.
//   2. Top-k and top-p are the same search: for the largest cut such that the tokens not below it number at least k, or weigh at least
//      p * mass. It sets one bit of an integer key at a time, in at most 32 steps, and is exact with ties.
//   3. Without a filter it sums chunks, then searches the chunk that holds the draw.
//
// The loops are simple enough for the compiler to vectorise. This file is compiled once per instruction set, with -DNGF_ISA=<name>.
#include "sampler/cpu_row.h"
#include "sampler/definition.h"

#define NGF_JOIN_(a, b) a##b
#define NGF_JOIN(a, b) NGF_JOIN_(a, b)

namespace ngf {
namespace {

constexpr int64_t CHUNK = 256;      // tokens summed at once when there is no filter
constexpr int64_t NUCLEUS_GUESS = 256;  // segments that the search for a nucleus tries first; language models rarely need more

struct Row {
  float max;
  Filter filter;
  uint64_t draw;
};

inline float y_of(const Row& row, float x) { return scaled(x, row.max, row.filter.temperature); }

// ---------------------------------------------------------------- passes over the row

template <class Logit> uint32_t segment_maxima(const Logit* x, int64_t V, uint32_t* segment) {
  uint32_t top = 0;
  const int64_t whole = V / SEGMENT;
  for (int64_t s = 0; s < whole; ++s) {
    uint32_t m = 0;
    for (int64_t i = 0; i < SEGMENT; ++i) {
      const uint32_t key = key_of(to_float(x[s * SEGMENT + i]));
      m = key > m ? key : m;
    }
    segment[s] = m;
    top = m > top ? m : top;
  }
  uint32_t rest = 0;
  for (int64_t i = whole * SEGMENT; i < V; ++i) {
    const uint32_t key = key_of(to_float(x[i]));
    rest = key > rest ? key : rest;
  }
  if (whole * SEGMENT < V) segment[whole] = rest;
  return rest > top ? rest : top;
}

// Bit i of the result: x[i] is not below `cut`. n is at most SEGMENT; callers in a loop pass a constant, so that it is unrolled.
template <class Logit> inline uint32_t reached(const Logit* x, int64_t n, uint32_t cut) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= (uint32_t)(key_of(to_float(x[i])) >= cut) << i;
  return bits;
}

// Collects the keys and indices of the tokens not below `cut` in `s`, in ascending index; returns their number.
template <class Logit> int64_t collect(const Logit* x, int64_t V, uint32_t cut, const Scratch& s) {
  static_assert(SEGMENT == 32, "a bit for each token of a segment");
  int64_t n = 0;
  for (int64_t begin = 0; begin < V; begin += SEGMENT) {
    if (s.segment[begin / SEGMENT] < cut) continue;
    uint32_t bits = begin + SEGMENT <= V ? reached(x + begin, SEGMENT, cut) : reached(x + begin, V - begin, cut);
    for (; bits; bits &= bits - 1) {
      const int64_t i = begin + __builtin_ctz(bits);
      s.key[n] = key_of(to_float(x[i]));
      s.index[n++] = (uint32_t)i;
    }
  }
  return n;
}

template <class Logit> uint64_t mass_of(const Logit* x, int64_t n, const Row& row) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float y = y_of(row, to_float(x[i]));
    sum += weight_of(y) & (0 - (uint64_t)(y >= row.filter.log_min_p));
  }
  return sum;
}

// ---------------------------------------------------------------- searches

// The largest cut with at least `wanted` (no more than n) of the keys not below it, or a lower one that keeps the same keys.
uint32_t cut_by_count(const uint32_t* key, int64_t n, int64_t wanted) {
  uint32_t cut = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = cut | (uint32_t)1 << bit;
    uint32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += key[i] >= higher;
    if (count < wanted) continue;
    cut = higher;
    if (count == wanted) break;
  }
  return cut;
}

// The largest cut with a mass of at least `wanted` (no more than all) not below it.
uint32_t cut_by_mass(const uint32_t* key, const uint64_t* weight, int64_t n, uint64_t wanted) {
  uint32_t cut = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = cut | (uint32_t)1 << bit;
    uint64_t mass = 0;
    for (int64_t i = 0; i < n; ++i) mass += key[i] >= higher ? weight[i] : 0;
    if (mass >= wanted) cut = higher;
  }
  return cut;
}

// Removes candidates below the cut, and keeps the order.
int64_t drop_below(uint32_t cut, int64_t n, const Scratch& s) {
  int64_t kept = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t key = s.key[j];
    s.key[kept] = key;
    s.index[kept] = s.index[j];
    kept += key >= cut;
  }
  return kept;
}

uint64_t weigh(int64_t n, const Row& row, const Scratch& s) {
  uint64_t mass = 0;
  const uint32_t* __restrict key = s.key;
  uint64_t* __restrict weight = s.weight;
  for (int64_t j = 0; j < n; ++j) mass += weight[j] = weight_of(y_of(row, value_of(key[j])));
  return mass;
}

// ---------------------------------------------------------------- greedy, unfiltered, filtered

template <class Logit> int64_t greedy(const Logit* x, uint32_t top, const Scratch& s) {
  int64_t i = 0;
  while (s.segment[i / SEGMENT] != top) i += SEGMENT;
  while (key_of(to_float(x[i])) != top) ++i;
  return i;
}

template <class Logit> int64_t draw_unfiltered(const Logit* x, int64_t V, const Row& row, const Scratch& s) {
  uint64_t mass = 0;                                             // min-p needs no search, so this handles it too
  uint64_t* const chunk = s.weight;
  for (int64_t begin = 0; begin < V; begin += CHUNK)
    mass += chunk[begin / CHUNK] = begin + CHUNK <= V ? mass_of(x + begin, CHUNK, row) : mass_of(x + begin, V - begin, row);
  uint64_t rest = high_product(row.draw, mass);
  int64_t i = 0;
  for (; rest >= chunk[i / CHUNK]; i += CHUNK) rest -= chunk[i / CHUNK];
  for (;; ++i) {
    const uint64_t w = mass_of(x + i, 1, row);
    if (rest < w) return i;
    rest -= w;
  }
}

template <class Logit> int64_t draw_filtered(const Logit* x, int64_t V, const Row& row, const Scratch& s) {
  const Filter& f = row.filter;
  const int64_t segments = (V + SEGMENT - 1) / SEGMENT;
  int64_t n;
  uint64_t mass;                                                 // of the tokens that top-k keeps
  if (f.k) {
    n = collect(x, V, f.k <= segments ? cut_by_count(s.segment, segments, f.k) : 0, s);
    n = drop_below(cut_by_count(s.key, n, f.k), n, s);
    mass = weigh(n, row, s);
  } else {                                                       // top-p alone: among the few largest, if they hold the nucleus
    Row all = row;
    all.filter.log_min_p = bits_as<float>(0xff800000u);          // min-p comes last
    mass = mass_of(x, V, all);
    n = collect(x, V, NUCLEUS_GUESS < segments ? cut_by_count(s.segment, segments, NUCLEUS_GUESS) : 0, s);
    if (weigh(n, row, s) < nucleus_mass(f.p, mass)) {
      n = collect(x, V, 0, s);
      weigh(n, row, s);
    }
  }
  const uint32_t cut = f.nucleus ? cut_by_mass(s.key, s.weight, n, nucleus_mass(f.p, mass)) : 0;
  mass = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint64_t kept = (s.key[j] >= cut) & (y_of(row, value_of(s.key[j])) >= f.log_min_p);
    mass += s.weight[j] &= 0 - kept;
  }
  uint64_t rest = high_product(row.draw, mass);
  int64_t j = 0;
  for (; rest >= s.weight[j]; ++j) rest -= s.weight[j];
  return s.index[j];
}

template <class Logit> int64_t draw_row(const Logit* x, int64_t V, const Filter& filter, uint64_t draw, const Scratch& s) {
  const uint32_t top = segment_maxima(x, V, s.segment);
  if (filter.greedy || top <= KEY_NEGATIVE_INFINITY) return greedy(x, top, s);
  const Row row = {value_of(top), filter, draw};
  return filter.k || filter.nucleus ? draw_filtered(x, V, row, s) : draw_unfiltered(x, V, row, s);
}

}  // namespace

void NGF_JOIN(sample_row_, NGF_ISA)(const Batch& batch, int64_t b, double log_min_p, const Scratch& s) {
  const Filter filter = make_filter(at(batch.temperature, b), at(batch.top_k, b), at(batch.top_p, b), at(batch.min_p, b),
                                    log_min_p, batch.vocab);
  const uint64_t draw = philox((uint64_t)batch.seed[b], (uint64_t)batch.offset[b]);
  batch.offset[b] = (int64_t)((uint64_t)batch.offset[b] + 1);
  const int64_t start = b * batch.row_stride;
  switch (batch.type) {
    case LogitType::fp32: batch.token[b] = draw_row((const float*)batch.logits + start, batch.vocab, filter, draw, s); break;
    case LogitType::bf16: batch.token[b] = draw_row((const bf16*)batch.logits + start, batch.vocab, filter, draw, s); break;
    case LogitType::fp16: batch.token[b] = draw_row((const fp16*)batch.logits + start, batch.vocab, filter, draw, s); break;
  }
}

}  // namespace ngf
