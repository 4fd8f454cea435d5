// Several threads for one call: PyTorch's own where they can be had.
//
// PyTorch's OpenMP threads go on spinning for a few milliseconds after each operator. A thread of ours would have to share its core with
// one of them, and the more so the shorter our work is. GOMP_parallel is the entry to that same team, in GNU's, LLVM's and Intel's OpenMP
// alike; it is looked up and not linked, for the extension has no OpenMP of its own to bring. Without it, and in a forked child,
// whose parent's threads did not come along, threads are made for the call; each takes some 15 us to start.
#pragma once
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace ngf {

using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

#ifdef __linux__
inline const pid_t loaded_by = getpid();
#endif

inline Parallel torch_team() {
#ifdef __linux__
  static const Parallel parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return getpid() == loaded_by ? parallel : nullptr;
#else
  return nullptr;
#endif
}

// work() on up to `members` threads at once, this one among them. It shares out what is to do by itself, as any number may come, and
// may not throw.
template <class Work> void on_team(int members, const Work& work) {
  if (members <= 1) return work();
  if (const Parallel parallel = torch_team())
    return parallel([](void* data) { (*(const Work*)data)(); }, (void*)&work, (unsigned)members, 0);
  std::vector<std::thread> team;
  team.reserve(members - 1);
  for (int i = 1; i < members; ++i) {
    try {
      team.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run, and this one, do it all
    }
  }
  work();
  for (std::thread& thread : team) thread.join();
}

}  // namespace ngf
