// Several threads for one call: PyTorch's own where they are available.
//
// PyTorch's OpenMP threads keep spinning for a few milliseconds after each operator. A separate thread would share its core with one of
// them, which hurts the more the shorter its work is. GOMP_parallel is the entry to PyTorch's team in GNU's, LLVM's and Intel's OpenMP.
// It is looked up at run time and not linked, so the extension brings no OpenMP of its own. Where it is missing, and in a forked child,
// which doesn't inherit its parent's threads, threads are started for the call; each takes about 15 us to start.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace ngf {

using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
using Count = int (*)();

struct TorchTeam {
  Parallel parallel = nullptr;
  Count number = nullptr, size = nullptr;  // the calling thread's number; the size of PyTorch's team
};

#ifdef __linux__
inline const pid_t loaded_by = getpid();
#endif

inline TorchTeam torch_team() {
#ifdef __linux__
  static const TorchTeam team{(Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel"), (Count)dlsym(RTLD_DEFAULT, "omp_get_thread_num"),
                              (Count)dlsym(RTLD_DEFAULT, "omp_get_max_threads")};
  if (team.parallel && team.number && team.size && getpid() == loaded_by) return team;
#endif
  return {};
}

// Calls work(member) on up to `members` threads at once; this thread is member 0. There may be fewer threads, so `work` must share out
// its items itself. It may not throw.
template <class Work> void on_team(int members, const Work& work) {
  if (members <= 1) return work(0);
  if (const TorchTeam torch = torch_team(); torch.parallel) {
    // As PyTorch does, this calls the whole team: GNU's OpenMP ends threads that a smaller team leaves out, and later restarts them.
    const auto run = [&] {
      if (const int member = torch.number(); member < members) work(member);
    };
    return torch.parallel([](void* data) { (*(decltype(run)*)data)(); }, (void*)&run, (unsigned)std::max(members, torch.size()), 0);
  }
  std::vector<std::thread> team;
  team.reserve(members - 1);
  for (int i = 1; i < members; ++i) {
    try {
      team.emplace_back([&work, i] { work(i); });
    } catch (const std::system_error&) {
      break;  // no more threads are available; those that run, and this one, do all of it
    }
  }
  work(0);
  for (std::thread& thread : team) thread.join();
}

// Work stealing: items 0 .. n - 1 are split into a contiguous share for each member, and an idle member takes from others' shares. The
// shares are the same in every call, and PyTorch splits rows the same way, so an operator finds what the last one wrote in its own cache.
class Shares {
 public:
  Shares(int64_t items, int members) : items(items), members(std::max(1, members)), next(this->members) {
    for (int m = 0; m < this->members; ++m) next[m] = begin(m);
  }
  bool take(int member, int64_t& item) {
    for (int k = 0; k < members; ++k) {
      const int m = (member + k) % members;
      if (next[m].load(std::memory_order_relaxed) < begin(m + 1) &&
          (item = next[m].fetch_add(1, std::memory_order_relaxed)) < begin(m + 1)) return true;
    }
    return false;
  }

 private:
  int64_t begin(int member) const { return items * member / members; }
  const int64_t items;
  const int members;
  std::vector<std::atomic<int64_t>> next;
};

// row(0) .. row(rows - 1), each an independent piece of `length` elements, on up to `threads` threads. 2^17 elements take about 100 us.
template <class Row> void for_rows(int64_t rows, int64_t length, int threads, const Row& row) {
  const int64_t members = std::max<int64_t>(1, std::min<int64_t>({threads, rows, rows * length / (1 << 17)}));
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, length));  // rows that a thread takes at a time
  Shares shares((rows + grain - 1) / grain, (int)members);
  on_team((int)members, [&](int member) {
    for (int64_t i; shares.take(member, i);)
      for (int64_t r = i * grain; r < std::min(rows, (i + 1) * grain); ++r) row(r);
  });
}

}  // namespace ngf
