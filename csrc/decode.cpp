// The decode step's outside: its stages, and a team of threads that deals out their chunks.
//
// A step is 5 stages a layer (project to q, k, v; attend; project back; up and activate; down) and the head. Each stage is cut into
// chunks that write disjoint outputs and read only what earlier stages wrote. Threads take chunks from a counter, and go on to the next
// stage when all chunks of this one are done. So no stage waits for a thread that the system has not started yet: one on a crowded
// machine finds the chunks taken. The team is made for the call and ends with it, as the sampler's (cpu.cpp says why).
#include "decode.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "sampler.h"

namespace ngf {
namespace {

const DecodeKernels& find_kernels(const std::string& isa) {
  const std::string available = cpu_isas();                          // best first, separated by blanks
  const std::string wanted = isa.empty() ? available.substr(0, available.find(' ')) : isa;
  if ((" " + available + " ").find(" " + wanted + " ") == std::string::npos)
    throw std::invalid_argument("isa is '" + isa + "'; this CPU and build have: " + available);
#ifdef NGF_X86
  if (wanted == "avx512") return decode_kernels_avx512;
  if (wanted == "avx2") return decode_kernels_avx2;
#endif
  return decode_kernels_baseline;
}

constexpr int64_t CHUNK = 64;  // outputs: with 768 inputs 196 KB of fp32 weights, 4 us, long against taking a chunk and short against a stage

struct Stage {
  enum Kind { project, attend, project_back, up, down, head } kind;
  int64_t layer;
  int64_t chunks;
};

struct Progress {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

struct Step {
  Model model;
  std::vector<LayerWeights> layers;
  std::vector<int64_t> token, position;
  float* logits;
  const DecodeKernels* kernels;
  std::vector<Stage> stages;
  std::unique_ptr<Progress[]> progress;
  std::vector<float> memory;
  Activations a;

  Step(const Model& m, const int64_t* tokens, const int64_t* positions, float* logits, const DecodeKernels& kernels)
      : model(m), layers(m.layers, m.layers + m.n_layer), token(tokens, tokens + m.rows), position(positions, positions + m.rows),
        logits(logits), kernels(&kernels), memory(m.rows * 9 * m.width) {
    float* const p = memory.data();
    const int64_t n = m.rows * m.width;
    a = {p, p + n, p + 4 * n, p + 5 * n};
    const auto cut = [](int64_t outputs) { return (outputs + CHUNK - 1) / CHUNK; };
    for (int64_t l = 0; l < m.n_layer; ++l) {
      stages.push_back({Stage::project, l, cut(3 * m.width)});
      stages.push_back({Stage::attend, l, m.rows * m.heads});
      stages.push_back({Stage::project_back, l, cut(m.width)});
      stages.push_back({Stage::up, l, cut(4 * m.width)});
      stages.push_back({Stage::down, l, cut(m.width)});
    }
    stages.push_back({Stage::head, 0, cut(m.vocab)});
    progress.reset(new Progress[stages.size()]);
    kernels.embed(model, a, token.data(), position.data());
  }

  // What one thread does. h: (rows, C) of its own; scores: (T + 16).
  void work(float* h, float* scores) {
    for (size_t s = 0; s < stages.size(); ++s) {
      const Stage& stage = stages[s];
      bool normed = false;
      for (int64_t chunk; (chunk = progress[s].next.fetch_add(1, std::memory_order_relaxed)) < stage.chunks;) {
        if (!normed && (stage.kind == Stage::project || stage.kind == Stage::up || stage.kind == Stage::head)) {
          norm(stage, h);                                            // every thread norms for itself: a microsecond, and no barrier
          normed = true;
        }
        run(stage, chunk, h, scores);
        progress[s].done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; progress[s].done.load(std::memory_order_acquire) < stage.chunks; ++spins)
        if (spins > 2000) std::this_thread::yield();                 // the one who has the last chunk may have lost its core
    }
  }

  void norm(const Stage& stage, float* h) const {
    const NormWeights& w = stage.kind == Stage::head ? model.ln_f : stage.kind == Stage::up ? layers[stage.layer].ln_2 : layers[stage.layer].ln_1;
    kernels->norm(model, w, a.x, h);
  }

  void run(const Stage& stage, int64_t chunk, const float* h, float* scores) const {
    const int64_t C = model.width;
    const auto linear = [&](const LinearWeights& w, const float* x, int64_t in, float* y, int64_t out, bool accumulate, bool activate) {
      kernels->linear(model, w, x, in, y, out, chunk * CHUNK, std::min(out, (chunk + 1) * CHUNK), accumulate, activate);
    };
    if (stage.kind == Stage::head) return linear(model.head, h, C, logits, model.vocab, false, false);
    const LayerWeights& layer = layers[stage.layer];
    switch (stage.kind) {
      case Stage::project:
        linear(layer.c_attn, h, C, a.qkv, 3 * C, false, false);
        return kernels->remember(model, layer, a, position.data(), chunk * CHUNK, std::min(3 * C, (chunk + 1) * CHUNK));
      case Stage::attend: {
        const int64_t row = chunk / model.heads;
        return kernels->attend(model, layer, a, row, chunk % model.heads, position[row], scores);
      }
      case Stage::project_back: return linear(layer.c_proj, a.attended, C, a.x, C, true, false);
      case Stage::up: return linear(layer.c_fc, h, C, a.hidden, 4 * C, false, true);
      case Stage::down: return linear(layer.mlp_proj, a.hidden, 4 * C, a.x, C, true, false);
      case Stage::head: return;
    }
  }
};

void check(const Model& m, const int64_t* token, const int64_t* position) {
  if (m.rows < 1 || m.rows > MAX_DECODE_ROWS)
    throw std::invalid_argument("rows is " + std::to_string(m.rows) + "; expected 1 to " + std::to_string(MAX_DECODE_ROWS));
  for (int64_t r = 0; r < m.rows; ++r) {
    if (token[r] < 0 || token[r] >= m.vocab)
      throw std::invalid_argument("token " + std::to_string(token[r]) + " in row " + std::to_string(r) + "; expected 0 to " +
                                  std::to_string(m.vocab - 1));
    if (position[r] < 0 || position[r] >= m.context)
      throw std::invalid_argument("position " + std::to_string(position[r]) + " in row " + std::to_string(r) + "; expected 0 to " +
                                  std::to_string(m.context - 1));
  }
}

}  // namespace

void decode_cpu(const Model& model, const int64_t* token, const int64_t* position, float* logits, int threads, const char* isa) {
  check(model, token, position);
  const auto step = std::make_shared<Step>(model, token, position, logits, find_kernels(isa));
  const size_t own = model.rows * model.width + model.context + 16;
  const auto work = [own](Step& step) {
    std::vector<float> memory(own);
    step.work(memory.data(), memory.data() + step.model.rows * step.model.width);
  };
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) {
    try {
      team.emplace_back([step, work] { work(*step); });
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run, and this one, do it all
    }
  }
  work(*step);
  for (std::thread& thread : team) thread.join();
}

}  // namespace ngf
