// The stages of a decode step, and a team of threads that shares out their chunks.
//
// A step has 5 stages a layer (project to q, k, v; attend; project back; up and activate; down) and the head. Each stage is split into
// chunks that write disjoint outputs and read only the results of earlier stages. Every thread has a contiguous share of a stage's chunks,
// so that it reads memory in order and knows what it will read next. An idle thread steals from the others' shares, and all threads go on
// when all chunks of the stage are done. So no stage waits for a thread that the system has not started yet: on a busy machine it finds
// the chunks taken. The team is started for the call and ends with it, as the sampler's (sampler/cpu.cpp says why).
#include "decode/decode.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "isa.h"

namespace ngf {
namespace {

const std::vector<DecodeKernels>& all_kernels() {                      // those that run here, best first
  static const std::vector<DecodeKernels> all = [] {
    std::vector<DecodeKernels> found;
#ifdef NGF_AMX
    if (cpu_has("avx512") && amx_works()) {
      DecodeKernels amx = decode_kernels_avx512;
      amx.isa = "amx";
      amx.chunk = 64;                                                  // four tiles side by side; 98 KB with 768 inputs
      amx.packs = true;
      amx.dots = dots_amx;
      found.push_back(amx);
    }
#endif
#ifdef NGF_X86
    if (cpu_has("avx512")) found.push_back(decode_kernels_avx512);
    if (cpu_has("avx2")) found.push_back(decode_kernels_avx2);
#endif
    found.push_back(decode_kernels_baseline);
    return found;
  }();
  return all;
}

const DecodeKernels& find_kernels(const Model& m, const std::string& isa) {
  for (const DecodeKernels& kernels : all_kernels())
    if ((isa.empty() || isa == kernels.isa) && (!kernels.packs || (m.type == WeightType::bf16 && m.width % 32 == 0))) return kernels;
  throw std::invalid_argument("isa is '" + isa + "'; this CPU, build and model have: " + decode_isas());
}

struct Stage {
  enum Kind { project, attend, project_back, up, down, head } kind;
  int64_t layer;
  int64_t chunks;
  const LinearWeights* linear;                                         // null for attend
  int64_t in, out;
};

struct alignas(64) Count {
  std::atomic<int64_t> value{0};
};

struct Step {
  Model model;
  std::vector<LayerWeights> layers;
  std::vector<int64_t> token, position;
  float* logits;
  const DecodeKernels* kernels;
  int64_t members;
  std::vector<Stage> stages;
  std::unique_ptr<Count[]> taken;                                      // (stages, members): chunks taken from a member's share
  std::unique_ptr<Count[]> done;                                       // (stages): chunks done
  std::unique_ptr<Count[]> begun;                                      // (members): 1 where the member works, or is no longer needed
  std::vector<float> memory;
  Activations a;

  Step(const Model& m, const int64_t* tokens, const int64_t* positions, float* logits, const DecodeKernels& kernels, int64_t members)
      : model(m), layers(m.layers, m.layers + m.n_layer), token(tokens, tokens + m.rows), position(positions, positions + m.rows),
        logits(logits), kernels(&kernels), members(members), memory(m.rows * 9 * m.width) {
    float* const p = memory.data();
    const int64_t C = m.width, n = m.rows * C;
    a = {p, p + n, p + 4 * n, p + 5 * n};
    const auto add = [&](Stage::Kind kind, int64_t layer, const LinearWeights& linear, int64_t in, int64_t out) {
      stages.push_back({kind, layer, (out + kernels.chunk - 1) / kernels.chunk, &linear, in, out});
    };
    for (int64_t l = 0; l < m.n_layer; ++l) {
      add(Stage::project, l, layers[l].c_attn, C, 3 * C);
      stages.push_back({Stage::attend, l, m.rows * m.heads, nullptr, 0, 0});
      add(Stage::project_back, l, layers[l].c_proj, C, C);
      add(Stage::up, l, layers[l].c_fc, C, 4 * C);
      add(Stage::down, l, layers[l].mlp_proj, 4 * C, C);
    }
    add(Stage::head, 0, model.head, C, m.vocab);
    taken.reset(new Count[stages.size() * members]);
    done.reset(new Count[stages.size()]);
    begun.reset(new Count[members]);
    kernels.embed(model, a, token.data(), position.data());
  }

  // One thread's work.
  void work(int64_t member) {
    std::vector<float> h(model.rows * model.width), scores(model.context + 16);
    std::vector<uint32_t> packed(kernels->packs ? model.rows * 2 * model.width : 0);
    for (size_t s = 0; s < stages.size(); ++s) {
      const Stage& stage = stages[s];
      const void* x = nullptr;                                       // of a linear stage; every thread computes its own, without a barrier
      for (int64_t chunk; (chunk = take(s, member)) >= 0;) {
        if (stage.kind == Stage::attend) {
          const int64_t row = chunk / model.heads;
          kernels->attend(model, layers[stage.layer], a, row, chunk % model.heads, position[row], scores.data());
        } else {
          if (!x) x = input(stage, h.data(), packed.data());
          linear(s, chunk, x, weights_after(s, chunk, member));
        }
        done[s].value.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; done[s].value.load(std::memory_order_acquire) < stage.chunks; ++spins)
        if (spins > 2000) std::this_thread::yield();                 // the thread with the last chunk may have lost its core
    }
  }

  int64_t share(size_t s, int64_t member) const { return stages[s].chunks * member / members; }  // where a member's begins

  // An untaken chunk of the stage: from the member's own share, otherwise from another's; -1 when there is none.
  int64_t take(size_t s, int64_t member) {
    for (int64_t i = 0; i < members; ++i) {
      const int64_t whose = (member + i) % members;
      const int64_t chunk = share(s, whose) + taken[s * members + whose].value.fetch_add(1, std::memory_order_relaxed);
      if (chunk < share(s, whose + 1)) return chunk;
    }
    return -1;
  }

  // The weights that this thread will probably read after a chunk: the next of its share, or the first of its share of the next linear
  // stage.
  const void* weights_after(size_t s, int64_t chunk, int64_t member) const {
    if (++chunk >= share(s, member + 1)) {
      do ++s;
      while (s < stages.size() && !stages[s].linear);
      if (s == stages.size()) return nullptr;
      chunk = share(s, member);
    }
    return (const char*)stages[s].linear->weight + chunk * kernels->chunk * stages[s].in * (model.type == WeightType::fp32 ? 4 : 2);
  }

  // The input of a linear stage, in the form that the kernels take.
  const void* input(const Stage& stage, float* h, uint32_t* packed) const {
    const float* x = h;
    switch (stage.kind) {
      case Stage::project: kernels->norm(model, layers[stage.layer].ln_1, a.x, h); break;
      case Stage::up: kernels->norm(model, layers[stage.layer].ln_2, a.x, h); break;
      case Stage::head: kernels->norm(model, model.ln_f, a.x, h); break;
      case Stage::project_back: x = a.attended; break;
      case Stage::down: x = a.hidden; break;
      case Stage::attend: break;
    }
    if (!kernels->packs) return x;
    kernels->pack(model, x, stage.in, packed);
    return packed;
  }

  void linear(size_t s, int64_t chunk, const void* x, const void* next) const {
    const Stage& stage = stages[s];
    const int64_t begin = chunk * kernels->chunk, end = std::min(stage.out, begin + kernels->chunk);
    const bool accumulate = stage.kind == Stage::project_back || stage.kind == Stage::down;
    float* const y = accumulate ? a.x : stage.kind == Stage::project ? a.qkv : stage.kind == Stage::up ? a.hidden : logits;
    float dot[MAX_CHUNK][MAX_DECODE_ROWS];
    kernels->dots(model, stage.linear->weight, x, stage.in, begin, end, next, dot);
    kernels->finish(model, stage.linear->bias, dot, y, stage.out, begin, end, accumulate, stage.kind == Stage::up);
    if (stage.kind == Stage::project) kernels->remember(model, layers[stage.layer], a, position.data(), begin, end);
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

const char* decode_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const DecodeKernels& kernels : all_kernels()) joined += (joined.empty() ? "" : " ") + std::string(kernels.isa);
    return joined;
  }();
  return names.c_str();
}

void decode_cpu(const Model& model, const int64_t* token, const int64_t* position, float* logits, int threads, const char* isa) {
  check(model, token, position);
  const int64_t members = std::max(1, threads);
  const auto step = std::make_shared<Step>(model, token, position, logits, find_kernels(model, isa), members);
  std::vector<std::thread> team;
  for (int64_t member = 1; member < members; ++member) {
    try {
      team.emplace_back([step, member] {
        if (!step->begun[member].value.exchange(1)) step->work(member);
      });
    } catch (const std::system_error&) {
      break;  // no more threads are available; those that run, and this one, do all of it
    }
  }
  step->work(0);
  for (size_t i = 0; i < team.size(); ++i) {                          // without waiting for threads that have not started
    if (step->begun[i + 1].value.exchange(1)) team[i].join();
    else team[i].detach();
  }
}

}  // namespace ngf
