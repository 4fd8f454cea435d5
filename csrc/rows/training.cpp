// Training's rows on the CPU (cross-entropy, attention's gradient, LayerNorm) and AdamW's step: checks, the choice of instruction set, and
// threads. The other files of this folder have the arithmetic.
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "rows/adamw.h"
#include "rows/attention.h"
#include "rows/cross_entropy.h"
#include "rows/layer_norm.h"
#include "team.h"

namespace ngf {

int64_t count_targets(const int64_t* targets, int64_t rows, int64_t vocab, int64_t ignore_index) {
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] == ignore_index) continue;
    if (targets[r] < 0 || targets[r] >= vocab)
      throw std::out_of_range("Target " + std::to_string(targets[r]) + " is out of bounds: expected 0 to " + std::to_string(vocab - 1) +
                              ", or " + std::to_string(ignore_index) + " for a row to ignore");
    ++count;
  }
  return count;
}

void cross_entropy_cpu(const LossRows& batch, int threads, const char* isa) {
  const CrossEntropyRow row = NGF_OF_ISA(cross_entropy_row, isa);
  for_rows(batch.rows, batch.vocab, threads, [&](int64_t r) { row(batch, r); });
}

void attention_gradient_cpu(const AttentionGradient& batch, int threads, const char* isa) {
  const AttentionRow row = NGF_OF_ISA(attention_row, isa);
  for_rows(batch.heads * batch.rows, batch.keys, threads, [&](int64_t r) { row(batch, r / batch.rows, r % batch.rows); });
}

void layer_norm_forward_cpu(const LayerNormForward& batch, int threads, const char* isa) {
  const LayerNormRow row = NGF_OF_ISA(layer_norm_row, isa);
  for_rows(batch.rows, batch.width, threads, [&](int64_t r) { row(batch, r); });
}

void layer_norm_backward_cpu(const LayerNormBackward& batch, int threads, const char* isa) {
  const LayerNormGradientRow row = NGF_OF_ISA(layer_norm_gradient_row, isa);
  const int64_t C = batch.width;
  const int64_t length = std::max<int64_t>(32, (batch.rows + 255) / 256);  // of a block; at most 256 blocks, whose sums are small beside the rows
  const int64_t blocks = (batch.rows + length - 1) / length;
  const std::unique_ptr<float[]> sums(new float[blocks * 2 * C]);
  for_rows(blocks, length * C, threads, [&](int64_t b) {
    float* const mine = sums.get() + b * 2 * C;
    std::fill(mine, mine + 2 * C, 0.0f);
    for (int64_t r = b * length; r < std::min(batch.rows, (b + 1) * length); ++r) row(batch, r, mine);
  });
  std::fill(batch.dweight, batch.dweight + C, 0.0f);
  std::fill(batch.dbias, batch.dbias + C, 0.0f);
  for (int64_t b = 0; b < blocks; ++b) {
    const float* const of_block = sums.get() + b * 2 * C;
    for (int64_t c = 0; c < C; ++c) batch.dweight[c] += of_block[c];
    for (int64_t c = 0; c < C; ++c) batch.dbias[c] += of_block[C + c];
  }
}

namespace {

// Many tensors split into pieces for independent threads: at most 2^15 elements, about 25 us each. GPT-2 124M has 3,840.
struct Piece {
  int64_t tensor, begin, end;
};
struct Pieces {
  std::vector<Piece> all;
  int64_t elements = 0;

  void add(int64_t tensor, int64_t size) {
    constexpr int64_t LARGEST = 1 << 15;
    for (int64_t begin = 0; begin < size; begin += LARGEST) all.push_back({tensor, begin, std::min(size, begin + LARGEST)});
    elements += size;
  }
  template <class Work> void each(int threads, const Work& work) const {  // work(i, all[i])
    const int64_t n = (int64_t)all.size();
    for_rows(n, elements / std::max<int64_t>(1, n), threads, [&](int64_t i) { work(i, all[i]); });
  }
};

}  // namespace

double gradient_squares_cpu(const float* const* gradients, const int64_t* sizes, int64_t count, int threads, const char* isa) {
  const SquaresPiece squares = NGF_OF_ISA(squares_piece, isa);
  Pieces pieces;
  for (int64_t i = 0; i < count; ++i) pieces.add(i, sizes[i]);
  std::vector<float> sums(pieces.all.size());
  pieces.each(threads, [&](int64_t i, const Piece& p) { sums[i] = squares(gradients[p.tensor] + p.begin, p.end - p.begin); });
  double total = 0;
  for (const float s : sums) total += s;
  return total;
}

void adamw_cpu(const AdamTensor* tensors, int64_t count, float factor, int threads, const char* isa) {
  const AdamPiece move = NGF_OF_ISA(adamw_piece, isa);
  std::vector<AdamNumbers> numbers;
  Pieces pieces;
  for (int64_t i = 0; i < count; ++i) {
    const AdamTensor& t = tensors[i];
    const double step = *t.step += 1;
    numbers.push_back({factor, (float)(1 - t.lr * t.weight_decay), (float)(1 - t.beta1), (float)t.beta2, (float)(1 - t.beta2),
                       (float)(t.lr / (1 - std::pow(t.beta1, step))), (float)std::sqrt(1 - std::pow(t.beta2, step)), (float)t.eps});
    pieces.add(i, t.size);
  }
  pieces.each(threads, [&](int64_t, const Piece& p) { move(tensors[p.tensor], numbers[p.tensor], p.begin, p.end); });
}

}  // namespace ngf
