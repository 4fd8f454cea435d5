// Several threads for one call: PyTorch's own where they can be had.
//
// PyTorch's OpenMP threads go on spinning for a few milliseconds after each operator. A thread of ours would have to share its core with
// one of them, and the more so the shorter our work is. GOMP_parallel is the entry to that same team, in GNU's, LLVM's and Intel's OpenMP
// alike; it is looked up and not linked, for the extension has no OpenMP of its own to bring. Without it, and in a forked child,
// whose parent's threads did not come along, threads are made for the call; each takes some 15 us to start.
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
  Count number = nullptr, size = nullptr;  // of the thread that asks; of PyTorch's team
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

// work(member) on up to `members` threads at once, this one is member 0. Fewer may come: it shares out what is to do by itself. It may
// not throw.
template <class Work> void on_team(int members, const Work& work) {
  if (members <= 1) return work(0);
  if (const TorchTeam torch = torch_team(); torch.parallel) {
    // All of them are called, as PyTorch does: GNU's OpenMP ends the threads that a smaller team leaves out, and starts them anew.
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
      break;  // no more threads to be had: those that run, and this one, do it all
    }
  }
  work(0);
  for (std::thread& thread : team) thread.join();
}

// Items 0 .. n - 1, cut into a piece for each member, who takes from the others' when its own is done. Pieces are the same from call to
// call, and PyTorch cuts rows likewise: what one operator wrote, the next finds in its own core's cache.
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

}  // namespace ngf
