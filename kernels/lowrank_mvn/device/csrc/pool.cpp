#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pool {
namespace {

// How long a worker looks for the next pass before it sleeps: the passes of one call follow each other within a few
// microseconds, and a worker that spins any longer takes the core from torch's threads.
constexpr int SPINS = 1000;

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

struct Pool {
    std::mutex in_use; // held by the caller whose passes are being made
    std::mutex door;
    std::condition_variable woken;
    int workers = 0;

    // The pass at hand. `ticket` counts passes; what it holds is written before it, under the door.
    std::atomic<uint64_t> ticket{0};
    Work work = nullptr;
    const void *context = nullptr;
    int64_t units = 0;
    int helpers = 0; // workers with a lower number take part
    std::atomic<int64_t> next{0};
    std::atomic<int> inside{0}; // workers that may still look at the pass

    void take_units() {
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(context, unit);
    }

    void live(int number) {
        uint64_t seen = 0;
        for (;;) {
            for (int i = 0; i < SPINS && ticket.load(std::memory_order_acquire) == seen; i++) pause_briefly();
            {
                std::unique_lock<std::mutex> lock(door);
                woken.wait(lock, [&] { return ticket.load(std::memory_order_relaxed) != seen; });
                seen = ticket.load(std::memory_order_relaxed);
                if (number >= helpers) continue;
                inside.fetch_add(1, std::memory_order_relaxed);
            }
            take_units();
            inside.fetch_sub(1, std::memory_order_release);
        }
    }

    void share(int64_t count, int64_t threads, Work do_unit, const void *of) {
        for (; workers < threads - 1; workers++) {
            try {
                std::thread([this, number = workers] { live(number); }).detach();
            } catch (const std::system_error &) {
                break; // no more threads to be had: fewer do the same work
            }
        }
        {
            std::lock_guard<std::mutex> lock(door);
            work = do_unit, context = of, units = count;
            helpers = int(threads - 1 < count - 1 ? threads - 1 : count - 1);
            next.store(0, std::memory_order_relaxed);
            ticket.fetch_add(1, std::memory_order_release);
        }
        woken.notify_all();
        take_units();
        {
            std::lock_guard<std::mutex> lock(door);
            helpers = 0; // who comes now is too late
        }
        for (int i = 0; inside.load(std::memory_order_acquire) > 0; i++) {
            if (i < SPINS) pause_briefly();
            else std::this_thread::yield();
        }
    }
};

// Never destroyed: workers outlive the end of the program. A child process starts with a new one, because its parent's
// workers are not in it, nor is it known who held which lock.
alignas(Pool) char room[sizeof(Pool)];
Pool *the_pool = nullptr;

void renew() { the_pool = new (room) Pool; }

struct Prepared {
    Prepared() {
        renew();
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, renew);
#endif
    }
} prepared;

} // namespace

void run(int64_t units, int64_t threads, Work work, const void *context) {
    if (threads > 1 && units > 1 && the_pool->in_use.try_lock()) {
        the_pool->share(units, threads, work, context);
        the_pool->in_use.unlock();
    } else {
        for (int64_t unit = 0; unit < units; unit++) work(context, unit);
    }
}

} // namespace pool
