#include "os/cancellation.h"

#include <dlfcn.h>
#include <pthread.h>

#include <mutex>

namespace anykvm::os {

/// The stays of threads whose cancellation is asynchronous; nearly always none.
struct CancelledThreads {
  static constinit inline std::mutex mutex;
  static constinit inline CancellationHold* first = nullptr;

  static void add(CancellationHold& hold) {
    const std::lock_guard lock(mutex);
    hold.next_ = first;
    first = &hold;
  }
  static void remove(CancellationHold& hold) {
    const std::lock_guard lock(mutex);
    for (CancellationHold** link = &first; *link; link = &(*link)->next_)
      if (*link == &hold) {
        *link = hold.next_;
        return;
      }
  }
  static void notify(pthread_t thread) {
    const std::lock_guard lock(mutex);
    for (CancellationHold* hold = first; hold; hold = hold->next_)
      if (hold->thread_ == thread) hold->notify_(hold->arg_);
  }
};

namespace {

[[gnu::tls_model("initial-exec")]] constinit thread_local bool asynchronous = false;

template <class Function>
Function* next_in_line(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}
int set_type(int type, int* old) {
  static const auto libc = next_in_line<int(int, int*)>("pthread_setcanceltype");
  return libc(type, old);
}
int cancel(pthread_t thread) {
  static const auto libc = next_in_line<int(pthread_t)>("pthread_cancel");
  return libc(thread);
}
/// Looked up before a thread needs them: dlsym() may allocate and take locks.
[[gnu::constructor]] void look_up() { set_type(PTHREAD_CANCEL_DEFERRED, nullptr); }

}  // namespace

CancellationHold::CancellationHold(void (*notify)(void*), void* arg) : notify_(notify), arg_(arg) {
  if (!asynchronous) [[likely]]
    return;
  int state;
  // Whoever cancels from here on finds the stay; whoever did before is seen when the type is set back.
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
  set_type(PTHREAD_CANCEL_DEFERRED, nullptr);
  thread_ = pthread_self();
  CancelledThreads::add(*this);
  registered_ = true;
  pthread_setcancelstate(state, nullptr);
  struct Ending {
    CancellationHold& hold;
    bool armed = true;
    ~Ending() {
      if (armed) hold.leave();
    }
  } ending{*this};
  pthread_testcancel();
  ending.armed = false;
}

void CancellationHold::leave() {
  if (!registered_) return;
  registered_ = false;
  CancelledThreads::remove(*this);
}

void CancellationHold::release() {
  if (!registered_) [[likely]]
    return;
  leave();
  set_type(PTHREAD_CANCEL_ASYNCHRONOUS, nullptr);
}

}  // namespace anykvm::os

// The names that clients link to. Not noexcept: a thread that is cancelled unwinds through them.
extern "C" {
[[gnu::visibility("default")]] int anykvm_pthread_setcanceltype(int type, int* old) asm("pthread_setcanceltype");
[[gnu::visibility("default")]] int anykvm_pthread_cancel(pthread_t thread) asm("pthread_cancel");

int anykvm_pthread_setcanceltype(int type, int* old) {
  using namespace anykvm::os;
  // First our own note: with the new type the thread may end in there.
  const bool before = asynchronous;
  if (type == PTHREAD_CANCEL_ASYNCHRONOUS || type == PTHREAD_CANCEL_DEFERRED)
    asynchronous = type == PTHREAD_CANCEL_ASYNCHRONOUS;
  const int result = set_type(type, old);
  if (result != 0) asynchronous = before;
  return result;
}

int anykvm_pthread_cancel(pthread_t thread) {
  const int result = anykvm::os::cancel(thread);
  if (result == 0) anykvm::os::CancelledThreads::notify(thread);
  return result;
}
}
