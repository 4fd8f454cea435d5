// The CPU sampler: chooses the instruction set, and runs rows in parallel on a team of threads.
//
// The team is started for the call and ends with it. Starting a thread takes about 15 us, a row 25 to 60, so only several rows are
// shared out. No thread works beyond the call, so forking between calls is safe. Why not PyTorch's OpenMP threads (team.h): for so short a
// call their start costs less, but its end is a barrier, at which a machine with more threads than cores was seen to wait 8 ms for a
// thread that had not run; here a helper that has not started is dismissed.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "isa.h"
#include "sampler/cpu_row.h"
#include "sampler/definition.h"

namespace ngf {
namespace {

// A thread's working memory. The calling thread keeps it between calls, since fresh pages cost more than a row; a helper allocates its
// own. Pages are touched only where used.
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
  const float m = at(batch.min_p, b);
  sample_row(batch, b, m > 0 ? std::log((double)m) : 0, scratch);
}

void sample_rows(const Batch& batch, SampleRow sample_row, std::atomic<int64_t>& next, const Scratch& scratch) {
  for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < batch.rows;) sample_one(batch, sample_row, b, scratch);
}

// On a busy machine a helper may start only when all rows are done. The call doesn't wait for it but dismisses it: it reads only its
// own state, which the shared team keeps alive, and ends.
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

void sample_cpu(const Batch& batch, int threads, const char* isa) {
  static const SampleRow best = NGF_OF_ISA(sample_row, "");
  const SampleRow sample_row = *isa ? NGF_OF_ISA(sample_row, isa) : best;
  const int64_t worthwhile = batch.rows * batch.vocab / 32768;  // a thread saves more than it costs from about that many logits on
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>({threads, batch.rows, worthwhile}));
  static thread_local Memory mine;
  if (members == 1) {                                            // without allocating or starting anything
    const Scratch scratch = mine.scratch(batch.vocab);
    for (int64_t b = 0; b < batch.rows; ++b) sample_one(batch, sample_row, b, scratch);
    return;
  }
  const auto team = std::make_shared<Team>(batch, members - 1);
  std::vector<std::thread> running;
  running.reserve(members - 1);
  for (Helper& helper : team->helpers) {
    helper.memory.scratch(batch.vocab);                          // allocated here, where std::bad_alloc can be raised
    try {
      running.emplace_back([team, sample_row, &helper] {
        int waiting = Helper::waiting;
        if (helper.state.compare_exchange_strong(waiting, Helper::working))
          sample_rows(team->batch, sample_row, team->next, helper.memory.scratch(team->batch.vocab));
      });
    } catch (const std::system_error&) {
      break;  // no more threads are available; those that run, and this one, do all the rows
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
