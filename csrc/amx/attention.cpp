// Causal attention on AMX tiles, forward and backward: attention.h is the interface, tiles.h has panels and their product.
//
// A thread takes a head, whose q, k and v fit into its L2 cache, and loops over panels of 32 queries. Scores are computed transposed, a row
// of S^T for each key, so a query is a column: maxima, sums and factors are vectors, and no sum goes across one. S^T in bf16 is a left
// operand in place (dV = P^T dO, dK = dS^T Q), and with pairs of its rows interleaved a right one (out^T = V^T P^T, dQ^T = K^T dS^T).
// Products with 32 keys that no query of the panel sees are skipped.
#include "amx/attention.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "amx/gemm_blocks.h"
#include "amx/tiles.h"
#include "team.h"

#ifdef NGF_AMX

namespace ngf {
namespace {

// exp to 2 units in the last place: 2^n times a Taylor polynomial of degree 6 in the remainder, at most ln 2 / 2.
NGF_AVX512 inline __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);                     // below that the result is 0; NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);   // ln 2 in two parts
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1 / 720.0f);
  for (const float c : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// Interleaves two rows of fp32 sums to one row of pairs: 16 columns of a right operand.
NGF_AVX512 inline __m512i interleave(__m512 even, __m512 odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);      // 16 of `even`, then 16 of `odd`
  return _mm512_permutexvar_epi16(halves_in_turn(), both);
}

// Writes sums (32 of the head's width from `c`, 32 queries from `q`) to rows of queries, each column times its factor.
NGF_AVX512 void write_columns(const float* sums, const float* factor, int64_t q, int64_t c, int64_t tokens, int64_t width, uint16_t* to,
                              int64_t stride) {
  const __mmask32 mask = first_of_32(width - c);
  for (int64_t half = 0; half < 2; ++half) {
    __m512i low[SIDE], high[SIDE];
    const __m512 f = _mm512_load_ps(factor + half * SIDE);
    for (int64_t i = 0; i < SIDE; ++i) {
      low[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(sums + i * PANEL + half * SIDE), f);
      high[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(sums + (SIDE + i) * PANEL + half * SIDE), f);
    }
    transpose(low);
    transpose(high);
    for (int64_t i = 0; i < SIDE && q + half * SIDE + i < tokens; ++i)
      _mm512_mask_storeu_epi16(to + (q + half * SIDE + i) * stride + c, mask,
                               (__m512i)_mm512_cvtne2ps_pbh((__m512)high[i], (__m512)low[i]));
  }
}

// Writes sums (32 keys from `k`, 32 of the width from `c`) to rows of keys.
NGF_AVX512 void write_rows(const float* sums, int64_t k, int64_t c, int64_t tokens, int64_t width, uint16_t* to, int64_t stride) {
  const __mmask32 mask = first_of_32(width - c);
  for (int64_t i = 0; i < PANEL && k + i < tokens; ++i)
    _mm512_mask_storeu_epi16(to + (k + i) * stride + c, mask,
                             (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + i * PANEL + SIDE), _mm512_load_ps(sums + i * PANEL)));
}

// One head: its address, and its size in panels.
struct Head {
  const uint16_t *q, *k, *v;               // row t at + t * stride
  int64_t stride, tokens, width;
  float scale;
  float* lse;
  int64_t panels() const { return up(tokens, PANEL); }
  int64_t depth() const { return up(width, PANEL); }
  int64_t size() const { return panels() * depth() * 2 * TILE; }     // elements of any of the operands below
  TileSource source(const uint16_t* x, int64_t x_stride) const { return {x, x_stride, tokens, width}; }
};

// Pack a matrix (tokens, width) as an operand. By panel of tokens, for sums over the width: a left operand (keys, values) ..
void left_by_token(const Head& h, const TileSource& x, uint16_t* to) {
  for (int64_t p = 0; p < h.panels(); ++p)
    for (int64_t s = 0; s < h.depth(); ++s)
      for (int64_t half = 0; half < 2; ++half, to += TILE) pack_left(x, p * PANEL + half * SIDE, s * DEPTH, to);
}

// .. or a transposed right one (queries, dO);
void right_by_token(const Head& h, const TileSource& x, uint16_t* to) {
  for (int64_t p = 0; p < h.panels(); ++p)
    for (int64_t s = 0; s < h.depth(); ++s)
      for (int64_t half = 0; half < 2; ++half, to += TILE) pack_right_transposed(x, p * PANEL + half * SIDE, s * DEPTH, to);
}

// by panel of the width, for sums over tokens: a transposed left operand (K^T, V^T) ..
void left_by_width(const Head& h, const TileSource& x, uint16_t* to) {
  for (int64_t e = 0; e < h.depth(); ++e)
    for (int64_t s = 0; s < h.panels(); ++s)
      for (int64_t half = 0; half < 2; ++half, to += TILE) pack_left_transposed(x, s * DEPTH, e * PANEL + half * SIDE, to);
}

// .. or a right one (Q, dO).
void right_by_width(const Head& h, const TileSource& x, uint16_t* to) {
  for (int64_t e = 0; e < h.depth(); ++e)
    for (int64_t s = 0; s < h.panels(); ++s)
      for (int64_t half = 0; half < 2; ++half, to += TILE) pack_right(x, s * DEPTH, e * PANEL + half * SIDE, to);
}

// Which of 32 queries see key `row` of 32, on the diagonal and below it.
inline __mmask32 seen(bool diagonal, int64_t row) { return diagonal ? 0xffffffffu << row : 0xffffffffu; }

// Turns S^T of one panel of queries, `keys` panels long, into exp(scale * (S - max)) in bf16, the right operand of out^T = V^T P^T. The
// result is still to be multiplied by `factor`, 1 / sum. Writes lse for existing tokens only.
NGF_AVX512 void softmax(const Head& h, int64_t query, const float* scores, int64_t keys, uint16_t* weights, float* factor) {
  const float infinity = INFINITY;
  for (int64_t c = 0; c < 2; ++c) {
    __m512 top = _mm512_set1_ps(-infinity), sum = _mm512_setzero_ps();
    const __m512 scale = _mm512_set1_ps(h.scale);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t r = 0; r < PANEL; ++r)
        top = _mm512_mask_max_ps(top, (__mmask16)(seen(j + 1 == keys, r) >> c * SIDE), top, _mm512_load_ps(scores + j * SUMS + r * PANEL + c * SIDE));
    top = _mm512_mul_ps(top, scale);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t r = 0; r < PANEL; r += 2) {
        __m512 e[2];
        for (int64_t i = 0; i < 2; ++i) {
          const __mmask16 mask = (__mmask16)(seen(j + 1 == keys, r + i) >> c * SIDE);
          const __m512 s = _mm512_mul_ps(_mm512_load_ps(scores + j * SUMS + (r + i) * PANEL + c * SIDE), scale);
          e[i] = _mm512_maskz_mov_ps(mask, exp_of(_mm512_sub_ps(s, top)));
          sum = _mm512_add_ps(sum, e[i]);
        }
        _mm512_store_si512(weights + (2 * j + c) * TILE + r / 2 * DEPTH, interleave(e[0], e[1]));
      }
    alignas(64) float tops[SIDE], sums[SIDE];
    _mm512_store_ps(tops, top);
    _mm512_store_ps(sums, sum);
    for (int64_t i = 0; i < SIDE; ++i) {
      const int64_t t = query + c * SIDE + i;
      factor[c * SIDE + i] = 1 / sums[i];
      if (t < h.tokens) h.lse[t] = tops[i] + std::log(sums[i]);
    }
  }
}

void forward_head(const Head& h, uint16_t* out, int64_t out_stride, TileMemory& memory) {
  const int64_t P = h.panels(), E = h.depth(), panel = E * 2 * TILE;
  uint16_t* const keys = memory.get<uint16_t>(3 * h.size() + 2 * P * TILE + 2 * (P + 1) * SUMS + 2 * PANEL);
  uint16_t *const queries = keys + h.size(), *const values = queries + h.size(), *const weights = values + h.size();
  float* const scores = (float*)(weights + 2 * P * TILE);
  float *const result = scores + P * SUMS, *const factor = result + SUMS;
  left_by_token(h, h.source(h.k, h.stride), keys);
  right_by_token(h, h.source(h.q, h.stride), queries);
  left_by_width(h, h.source(h.v, h.stride), values);
  for (int64_t i = 0; i < P; ++i) {
    for (int64_t j = 0; j <= i; ++j) multiply(packed_left(keys + j * panel), queries + i * panel, E, true, scores + j * SUMS);
    softmax(h, i * PANEL, scores, i + 1, weights, factor);
    for (int64_t e = 0; e < E; ++e) {
      multiply(packed_left(values + e * P * 2 * TILE), weights, i + 1, true, result);
      write_columns(result, factor, i * PANEL, e * PANEL, h.tokens, h.width, out, out_stride);
    }
  }
}

// Turns S^T and dP^T of a panel of queries into P^T and, once delta is known, dS^T = scale P^T (dP^T - delta). Both are written in bf16 as
// left operands, step `side` of two for each panel of keys; dS^T also as a right operand. With large scores, whose lse has few digits after
// the point, a query's weights do not add up to 1; delta and dS are of weights divided by their own sum.
NGF_AVX512 void score_gradient(const Head& h, int64_t query, float* scores, const float* dp, int64_t keys, int64_t side, uint16_t* p_left,
                               uint16_t* ds_left, uint16_t* ds_right) {
  alignas(64) float lse[PANEL];
  for (int64_t i = 0; i < PANEL; ++i) lse[i] = query + i < h.tokens ? h.lse[query + i] : INFINITY;
  const __m512 scale = _mm512_set1_ps(h.scale), lses[2] = {_mm512_load_ps(lse), _mm512_load_ps(lse + SIDE)};
  __m512 delta[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, factor[2];
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t r = 0; r < PANEL; ++r) {
      float* const at = scores + j * SUMS + r * PANEL;
      __m512 p[2];
      for (int64_t c = 0; c < 2; ++c) {                              // rounded as in the forward, so that a single key has a weight of 1
        const __m512 s = _mm512_sub_ps(_mm512_mul_ps(_mm512_load_ps(at + c * SIDE), scale), lses[c]);
        p[c] = _mm512_maskz_mov_ps((__mmask16)(seen(j + 1 == keys, r) >> c * SIDE), exp_of(s));
        delta[c] = _mm512_fmadd_ps(p[c], _mm512_load_ps(dp + j * SUMS + r * PANEL + c * SIDE), delta[c]);
        sum[c] = _mm512_add_ps(sum[c], p[c]);
        _mm512_store_ps(at + c * SIDE, p[c]);
      }
      _mm512_store_si512(p_left + (j * 4 + 2 * side) * TILE + r * DEPTH, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
    }
  for (int64_t c = 0; c < 2; ++c) {
    sum[c] = _mm512_max_ps(_mm512_set1_ps(1e-30f), sum[c]);          // 0 behind the last token; NaN stays NaN
    delta[c] = _mm512_div_ps(delta[c], sum[c]);
    factor[c] = _mm512_div_ps(scale, sum[c]);
  }
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t r = 0; r < PANEL; r += 2) {
      __m512 ds[2][2];
      for (int64_t i = 0; i < 2; ++i) {
        for (int64_t c = 0; c < 2; ++c) {
          const int64_t at = j * SUMS + (r + i) * PANEL + c * SIDE;
          ds[i][c] = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(scores + at), factor[c]), _mm512_sub_ps(_mm512_load_ps(dp + at), delta[c]));
        }
        _mm512_store_si512(ds_left + (j * 4 + 2 * side) * TILE + (r + i) * DEPTH, (__m512i)_mm512_cvtne2ps_pbh(ds[i][1], ds[i][0]));
      }
      for (int64_t c = 0; c < 2; ++c)
        _mm512_store_si512(ds_right + (2 * j + c) * TILE + r / 2 * DEPTH, interleave(ds[0][c], ds[1][c]));
    }
}

void backward_head(const Head& h, const uint16_t* dout, int64_t dout_stride, uint16_t* dq, uint16_t* dk, uint16_t* dv, TileMemory& memory) {
  const int64_t P = h.panels(), E = h.depth(), panel = E * 2 * TILE, block = P * SUMS;
  uint16_t* const keys = memory.get<uint16_t>(7 * h.size() + 10 * P * TILE + 2 * (2 * block + 2 * E * block + SUMS + PANEL));
  uint16_t *const values = keys + h.size(), *const queries = values + h.size(), *const douts = queries + h.size();
  uint16_t *const keys_t = douts + h.size(), *const queries_w = keys_t + h.size(), *const douts_w = queries_w + h.size();
  uint16_t *const p_left = douts_w + h.size(), *const ds_left = p_left + 4 * P * TILE, *const ds_right = ds_left + 4 * P * TILE;
  float* const scores = (float*)(ds_right + 2 * P * TILE);
  float *const dp = scores + block, *const dks = dp + block, *const dvs = dks + E * block, *const result = dvs + E * block;
  float* const ones = result + SUMS;
  std::fill(ones, ones + PANEL, 1.0f);
  left_by_token(h, h.source(h.k, h.stride), keys);
  left_by_token(h, h.source(h.v, h.stride), values);
  right_by_token(h, h.source(h.q, h.stride), queries);
  right_by_token(h, h.source(dout, dout_stride), douts);
  left_by_width(h, h.source(h.k, h.stride), keys_t);
  right_by_width(h, h.source(h.q, h.stride), queries_w);
  right_by_width(h, h.source(dout, dout_stride), douts_w);
  for (int64_t i = 0; i < P; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      multiply(packed_left(keys + j * panel), queries + i * panel, E, true, scores + j * SUMS);
      multiply(packed_left(values + j * panel), douts + i * panel, E, true, dp + j * SUMS);
    }
    score_gradient(h, i * PANEL, scores, dp, i + 1, i % 2, p_left, ds_left, ds_right);
    for (int64_t e = 0; e < E; ++e) {
      multiply(packed_left(keys_t + e * P * 2 * TILE), ds_right, i + 1, true, result);
      write_columns(result, ones, i * PANEL, e * PANEL, h.tokens, h.width, dq, h.stride);
    }
    if (i % 2 == 0 && i + 1 < P) continue;                           // dk and dv are updated for two panels of queries at a time
    for (int64_t j = 0; j <= i; ++j) {
      const int64_t first = std::max(i / 2 * 2, j) % 2, steps = i % 2 + 1 - first;  // the last keys see only the second of the two
      const int64_t at = (i / 2 * 2 + first) * 2 * TILE;
      for (int64_t e = 0; e < E; ++e) {
        multiply(packed_left(p_left + (j * 4 + 2 * first) * TILE), douts_w + e * P * 2 * TILE + at, steps, i / 2 == j / 2, dvs + (j * E + e) * SUMS);
        multiply(packed_left(ds_left + (j * 4 + 2 * first) * TILE), queries_w + e * P * 2 * TILE + at, steps, i / 2 == j / 2, dks + (j * E + e) * SUMS);
      }
    }
  }
  for (int64_t j = 0; j < P; ++j)
    for (int64_t e = 0; e < E; ++e) {
      write_rows(dks + (j * E + e) * SUMS, j * PANEL, e * PANEL, h.tokens, h.width, dk, h.stride);
      write_rows(dvs + (j * E + e) * SUMS, j * PANEL, e * PANEL, h.tokens, h.width, dv, h.stride);
    }
}

// Calls work(head, its offset in (B, T, C), in (B, T, 3C), memory) for every head.
template <class Work> void for_heads(const PackedAttention& a, int threads, const Work& work) {
  check_amx();
  const int64_t all = a.batch * a.heads, C = a.heads * a.width;
  threads = (int)std::min<int64_t>({threads, all, 1 + all * a.tokens * a.tokens * a.width / (1 << 21)});
  Shares shares(all, threads);
  on_team(threads, [&](int member) {
    static thread_local TileMemory memory;
    with_tiles([&] {
      for (int64_t i; shares.take(member, i);) {
        const int64_t b = i / a.heads, head = i % a.heads, packed = b * a.tokens * 3 * C + head * a.width;
        const uint16_t* const q = a.qkv + packed;
        work(Head{q, q + C, q + 2 * C, 3 * C, a.tokens, a.width, a.scale, a.lse + i * a.tokens}, b * a.tokens * C + head * a.width, packed, memory);
      }
    });
  });
}

}  // namespace

void attention_forward_amx(const PackedAttention& a, uint16_t* out, int threads) {
  const int64_t C = a.heads * a.width;
  for_heads(a, threads, [&](const Head& h, int64_t place, int64_t, TileMemory& memory) { forward_head(h, out + place, C, memory); });
}

void attention_backward_amx(const PackedAttention& a, const uint16_t* dout, uint16_t* dqkv, int threads) {
  const int64_t C = a.heads * a.width;
  for_heads(a, threads, [&](const Head& h, int64_t place, int64_t packed, TileMemory& memory) {
    backward_head(h, dout + place, C, dqkv + packed, dqkv + packed + C, dqkv + packed + 2 * C, memory);
  });
}

}  // namespace ngf

#else

namespace ngf {
void attention_forward_amx(const PackedAttention&, uint16_t*, int) { throw std::runtime_error("the extension was built without AMX"); }
void attention_backward_amx(const PackedAttention&, const uint16_t*, uint16_t*, int) { throw std::runtime_error("the extension was built without AMX"); }
}  // namespace ngf

#endif
