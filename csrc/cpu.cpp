// The CPU sampler's outside: which instruction set, and rows in parallel on a team of threads.
//
// The team is made for the call and ends with it: starting a thread takes about 15 us, a row 25 to 60, so rows are dealt out only
// when there are several. No thread works beyond the call, so a fork in between is safe, and no second OpenMP runtime meets PyTorch's.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu_row.h"

namespace ngf {
namespace {

struct Isa {
  const char* name;
  SampleRow sample_row;
};

const std::vector<Isa>& isas() {  // best first
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found;
#ifdef NGF_X86
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && isa_allowed("avx512")) found.push_back({"avx512", sample_row_avx512});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && isa_allowed("avx2")) found.push_back({"avx2", sample_row_avx2});
#endif
    found.push_back({"baseline", sample_row_baseline});
    return found;
  }();
  return all;
}

const Isa& find(const std::string& name) {
  for (const Isa& isa : isas())
    if (name.empty() || name == isa.name) return isa;
  throw std::invalid_argument("isa is '" + name + "'; this CPU and build have: " + cpu_isas());
}

// A thread's working memory: kept between calls, since fresh pages cost more than a row does; touched only where it is used.
struct Memory {
  std::unique_ptr<uint64_t[]> words;
  int64_t vocab = 0;

  Scratch scratch(int64_t V) {
    if (V > vocab) {
      words.reset(new uint64_t[2 * V + V / SEGMENT / 2 + 2]);
      vocab = V;
    }
    uint32_t* const key = (uint32_t*)(words.get() + V);
    return {key + 2 * V, key, key + V, words.get()};
  }
};

void sample_one(const Batch& batch, SampleRow sample_row, int64_t b, const Scratch& scratch) {
  const float m = batch.min_p.rows ? batch.min_p.rows[b] : batch.min_p.value;
  sample_row(batch, b, m > 0 ? std::log((double)m) : 0, scratch);
}

void sample_rows(const Batch& batch, SampleRow sample_row, std::atomic<int64_t>& next, const Scratch& scratch) {
  for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < batch.rows;) sample_one(batch, sample_row, b, scratch);
}

// On a machine with other work a helper may come to run only when all rows are done. It is then not waited for: it was dismissed,
// touches nothing but its own state, which the shared team keeps alive, and ends.
struct Helper {
  enum { waiting, working, dismissed };
  std::atomic<int> state{waiting};
  Memory memory;
};

struct Team {
  Team(const Batch& batch, int64_t size) : batch(batch), helpers(size) {}
  const Batch batch;
  std::atomic<int64_t> next{0};
  std::vector<Helper> helpers;
};

}  // namespace

bool isa_allowed(const char* isa) {
  static const std::vector<std::string> all = {"amx", "avx512", "avx2", "baseline"};  // best first
  const char* const best = std::getenv("NANOGPT_FAST_ISA");
  if (best == nullptr || *best == 0) return true;
  const auto place = [](const char* name) { return std::find(all.begin(), all.end(), name); };
  if (place(best) == all.end()) throw std::invalid_argument("NANOGPT_FAST_ISA is '" + std::string(best) + "'; expected amx, avx512, avx2 or baseline");
  return place(isa) >= place(best);
}

const char* cpu_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Isa& isa : isas()) joined += (joined.empty() ? "" : " ") + std::string(isa.name);
    return joined;
  }();
  return names.c_str();
}

void sample_cpu(const Batch& batch, int threads, const char* isa) {
  const SampleRow sample_row = find(isa).sample_row;
  const int64_t worthwhile = batch.rows * batch.vocab / 32768;  // a thread pays for itself from about that many logits on
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>({threads, batch.rows, worthwhile}));
  static thread_local Memory mine;
  if (members == 1) {                                            // nothing is allocated, nobody is asked
    const Scratch scratch = mine.scratch(batch.vocab);
    for (int64_t b = 0; b < batch.rows; ++b) sample_one(batch, sample_row, b, scratch);
    return;
  }
  const auto team = std::make_shared<Team>(batch, members - 1);
  std::vector<std::thread> running;
  running.reserve(members - 1);
  for (Helper& helper : team->helpers) {
    helper.memory.scratch(batch.vocab);                          // allocated here, where running out of memory can be raised
    try {
      running.emplace_back([team, sample_row, &helper] {
        int waiting = Helper::waiting;
        if (helper.state.compare_exchange_strong(waiting, Helper::working))
          sample_rows(team->batch, sample_row, team->next, helper.memory.scratch(team->batch.vocab));
      });
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run, and this one, do all the rows
    }
  }
  sample_rows(team->batch, sample_row, team->next, mine.scratch(batch.vocab));
  for (size_t i = 0; i < running.size(); ++i) {
    int waiting = Helper::waiting;
    if (team->helpers[i].state.compare_exchange_strong(waiting, Helper::dismissed)) running[i].detach();
    else running[i].join();
  }
}

}  // namespace ngf
