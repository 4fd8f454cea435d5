// Raw bytes as logits and parameters for the CPU sampler, to be compiled with -fsanitize=address,undefined.
//
// Every instruction set and several team sizes must give the same token, inside the vocabulary, advance the offset by one, write
// nowhere else (the sanitizer sees to that: all buffers are exactly as long as they must be), and agree with a sampler that sorts.
//
//     fuzz <seconds> <seed>          bytes from a generator; prints the number of rows, exits 1 at a finding
//     clang++ -fsanitize=fuzzer,...  LLVMFuzzerTestOneInput, guided by coverage
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "isa.h"
#include "sampler/definition.h"
#include "sampler/sampler.h"

namespace {

using namespace ngf;

struct Bytes {  // what is left of the input; zeros after its end
  const uint8_t* data;
  size_t size;

  template <class T> T take() {
    T value{};
    const size_t n = std::min(sizeof value, size);
    if (n) memcpy(&value, data, n);
    data += n;
    size -= n;
    return value;
  }
};

// The definition by sorting: nothing of cpu_row.cpp in it.
template <class Logit> int64_t token_by_sorting(const Logit* x, int64_t V, const Filter& f, uint64_t draw) {
  std::vector<uint32_t> key(V), order(V);
  for (int64_t i = 0; i < V; ++i) key[i] = key_of(to_float(x[i])), order[i] = (uint32_t)i;
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return key[a] > key[b]; });
  const uint32_t top = key[order[0]];
  if (f.greedy || top <= KEY_NEGATIVE_INFINITY) return order[0];
  std::vector<uint64_t> weight(V, 0);
  uint64_t mass = 0;
  std::vector<float> y(V);
  int64_t kept = 0;
  for (; kept < V; ++kept) {
    const uint32_t i = order[kept];
    if (f.k && kept >= f.k && key[i] != key[order[f.k - 1]]) break;
    y[i] = scaled(key[i] == 0 ? -INFINITY : value_of(key[i]), value_of(top), f.temperature);
    mass += weight[i] = weight_of(y[i]);
  }
  uint64_t above = 0, before = 0;
  for (int64_t j = 0; j < kept; ++j) {
    const uint32_t i = order[j];
    if (j && key[i] != key[order[j - 1]]) above = before;
    before += weight[i];
    const bool in_nucleus = !f.nucleus || above == 0 || (unsigned __int128)above << 32 < (unsigned __int128)f.p * mass;
    if (!in_nucleus || !(y[i] >= f.log_min_p)) weight[i] = 0;
  }
  uint64_t total = 0, upto = 0;
  for (uint64_t w : weight) total += w;
  const uint64_t r = (uint64_t)((unsigned __int128)draw * total >> 64);
  for (int64_t i = 0;; ++i)
    if ((upto += weight[i]) > r) return i;
}

void fail(const char* what) {
  fprintf(stderr, "finding: %s\n", what);
  abort();
}

template <class Logit> int64_t expected_token(const Batch& batch, int64_t b, int64_t offset) {
  const float m = batch.min_p.rows[b];
  const Filter f = make_filter(batch.temperature.rows[b], batch.top_k.rows[b], batch.top_p.rows[b], m, m > 0 ? std::log((double)m) : 0, batch.vocab);
  return token_by_sorting((const Logit*)batch.logits + b * batch.row_stride, batch.vocab, f, philox(batch.seed[b], offset));
}

int64_t rows_done = 0;

void try_bytes(const uint8_t* data, size_t size) {
  Bytes bytes{data, size};
  const int type = bytes.take<uint8_t>() % 3;
  const size_t width = type == 0 ? 4 : 2;
  const int64_t rows = bytes.take<uint8_t>() % 4;
  // Mostly small vocabularies; some around the sizes of segments and chunks, some that several threads share.
  const uint8_t kind = bytes.take<uint8_t>();
  const int64_t vocab = 1 + bytes.take<uint16_t>() % (kind < 200 ? 40 : kind < 250 ? 700 : 60000);
  const int64_t stride = vocab + bytes.take<uint8_t>() % 4;
  const uint8_t pattern = bytes.take<uint8_t>();

  std::unique_ptr<float[]> temperature(new float[rows]), top_p(new float[rows]), min_p(new float[rows]);
  std::unique_ptr<int64_t[]> top_k(new int64_t[rows]), seed(new int64_t[rows]), offset(new int64_t[rows]), before(new int64_t[rows]);
  const auto number = [&](bool below_one) {  // raw bits, or a number that a user might give
    const uint8_t which = bytes.take<uint8_t>();
    return which < 64 ? bytes.take<float>() : which < 96 ? 0.0f : which < 128 ? 1.0f : bytes.take<uint16_t>() / (below_one ? 65535.0f : 8192.0f);
  };
  for (int64_t b = 0; b < rows; ++b) {
    temperature[b] = number(false);
    top_p[b] = number(true);
    min_p[b] = number(true);
    top_k[b] = bytes.take<uint8_t>() < 64 ? bytes.take<int64_t>() : bytes.take<uint16_t>() % (vocab + 2);
    seed[b] = bytes.take<int64_t>();
    before[b] = bytes.take<int64_t>();
  }
  // The last row ends where the buffer ends: a read past it is seen.
  const size_t length = rows ? ((rows - 1) * stride + vocab) * width : 0;
  std::unique_ptr<uint8_t[]> logits(new uint8_t[length]);
  for (size_t i = 0; i < length; ++i) logits[i] = bytes.size ? bytes.take<uint8_t>() : pattern & 1 ? logits[i % (8 * width)] : (uint8_t)(i * 2654435761u >> (pattern % 24));
  if (pattern & 2 && type == 0)  // plausible logits instead of raw bits
    for (size_t i = 0; i + 4 <= length; i += 4) {
      const float value = (int8_t)logits[i] / 8.0f;
      memcpy(&logits[i], &value, 4);
    }

  std::vector<int64_t> first;
  std::istringstream isas(cpu_isas());
  for (std::string isa; isas >> isa;) {
    for (int threads : {1, 3}) {
      std::unique_ptr<int64_t[]> token(new int64_t[rows]);
      std::copy(before.get(), before.get() + rows, offset.get());
      const Batch batch{logits.get(), (LogitType)type, rows, vocab, stride, {temperature.get(), 0}, {top_k.get(), 0}, {top_p.get(), 0},
                        {min_p.get(), 0}, seed.get(), offset.get(), token.get()};
      sample_cpu(batch, threads, isa.c_str());
      for (int64_t b = 0; b < rows; ++b) {
        if (token[b] < 0 || token[b] >= vocab) fail("a token outside the vocabulary");
        if ((uint64_t)offset[b] != (uint64_t)before[b] + 1) fail("the offset did not advance by one");
        if (first.size() == (size_t)rows) {
          if (token[b] != first[b]) fail("instruction sets or teams disagree");
          continue;
        }
        const int64_t expected = type == 0 ? expected_token<float>(batch, b, before[b]) : type == 1 ? expected_token<bf16>(batch, b, before[b])
                                                                                                    : expected_token<fp16>(batch, b, before[b]);
        if (token[b] != expected) fail("not the token that sorting finds");
      }
      if (first.size() != (size_t)rows) first.assign(token.get(), token.get() + rows);
    }
  }
  rows_done += rows;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try_bytes(data, size);
  return 0;
}

#ifndef NGF_LIBFUZZER
int main(int count, char** arguments) {
  if (count != 3) return fprintf(stderr, "usage: fuzz <seconds> <seed>\n"), 2;
  std::mt19937_64 random(strtoull(arguments[2], nullptr, 10));
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(atof(arguments[1]));
  int64_t inputs = 0;
  for (; std::chrono::steady_clock::now() < end; ++inputs) {
    std::vector<uint8_t> data(random() % (inputs % 8 ? 512 : 8192));
    // All kinds of bytes, few different ones (many ties), or those of extreme exponents.
    const uint64_t kind = random() % 4, alphabet = random();
    for (uint8_t& byte : data) byte = kind == 0 ? (uint8_t)(alphabet >> random() % 8 * 8) : kind == 1 && random() % 4 == 0 ? 0x7f | random() << 7 : random();
    try_bytes(data.data(), data.size());
  }
  printf("%lld inputs, %lld rows, no finding\n", (long long)inputs, (long long)rows_done);
}
#endif
