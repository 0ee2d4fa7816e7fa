#include "vm/irqfd.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>

#include "os/signals_blocked.h"

namespace anykvm::vm {

IrqFds::Resampler::Resampler(IrqRouting& routing, u32 gsi) : gsi(gsi), routing_(routing) {
  routing_.add_end_listener(gsi, *this);
}

IrqFds::Resampler::~Resampler() {
  routing_.remove_end_listener(gsi, *this);
  routing_.set_irq(gsi, false, irqchip::irq_source_resample);
}

void IrqFds::Resampler::interrupt_ended(u32) {
  // Down first: a device that still wants service raises the line again when it is asked.
  routing_.set_irq(gsi, false, irqchip::irq_source_resample);
  std::lock_guard lock(mutex);
  for (const EventFd& event : events) event.signal();
}

IrqFds::~IrqFds() {
  if (thread_.joinable()) {
    stop_.signal();
    thread_.join();
  }
  while (!entries_.empty()) remove(entries_.begin());
  if (poll_fd_ >= 0) close(poll_fd_);
}

int IrqFds::ioctl(const kvm_irqfd& args) {
  if (args.flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE)) return -EINVAL;
  return args.flags & KVM_IRQFD_FLAG_DEASSIGN ? deassign(args) : assign(args);
}

int IrqFds::assign(const kvm_irqfd& args) {
  Entry entry{.gsi = args.gsi};
  EventFd resample;
  if (const int error = EventFd::open(static_cast<int>(args.fd), entry.event)) return error;
  if (args.flags & KVM_IRQFD_FLAG_RESAMPLE)
    if (const int error = EventFd::open(static_cast<int>(args.resamplefd), resample)) return error;

  std::lock_guard lock(mutex_);
  const auto same_event = [&](const Entry& other) { return other.event.identity() == entry.event.identity(); };
  if (std::ranges::any_of(entries_, same_event)) return -EBUSY;
  if (const int error = start()) return error;

  entry.token = next_token_++;
  // Level-triggered, so that an event which came before the assignment counts.
  epoll_event interest{.events = EPOLLIN, .data = {.u64 = entry.token}};
  if (epoll_ctl(poll_fd_, EPOLL_CTL_ADD, entry.event.fd(), &interest) != 0) return -errno;
  if (args.flags & KVM_IRQFD_FLAG_RESAMPLE) {
    const auto sharer = std::ranges::find_if(
        entries_, [&](const Entry& other) { return other.resampler && other.resampler->gsi == args.gsi; });
    entry.resampler = sharer != entries_.end() ? sharer->resampler : std::make_shared<Resampler>(routing_, args.gsi);
    std::lock_guard events_lock(entry.resampler->mutex);
    entry.resample_event = entry.resampler->events.insert(entry.resampler->events.end(), std::move(resample));
  }
  entries_.push_back(std::move(entry));
  return 0;
}

int IrqFds::deassign(const kvm_irqfd& args) {
  u64 identity;
  if (const int error = EventFd::identify(static_cast<int>(args.fd), identity)) return error;
  std::lock_guard lock(mutex_);
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    const auto current = entry++;
    if (current->event.identity() == identity && current->gsi == args.gsi) remove(current);
  }
  return 0;
}

void IrqFds::remove(std::list<Entry>::iterator entry) {
  epoll_ctl(poll_fd_, EPOLL_CTL_DEL, entry->event.fd(), nullptr);
  if (entry->resampler) {
    std::lock_guard lock(entry->resampler->mutex);
    entry->resampler->events.erase(entry->resample_event);
  }
  entries_.erase(entry);
}

int IrqFds::start() {
  if (thread_.joinable()) return 0;
  if (poll_fd_ < 0 && (poll_fd_ = epoll_create1(EPOLL_CLOEXEC)) < 0) return -errno;
  const int stop = eventfd(0, EFD_CLOEXEC);
  if (stop < 0) return -errno;
  const int error = EventFd::open(stop, stop_);
  close(stop);
  if (error) return error;
  epoll_event interest{.events = EPOLLIN, .data = {.u64 = 0}};
  if (epoll_ctl(poll_fd_, EPOLL_CTL_ADD, stop_.fd(), &interest) != 0) return -errno;
  const os::SignalsBlocked blocked;
  thread_ = std::thread([this] { run(); });
  return 0;
}

void IrqFds::run() {
  for (;;) {
    epoll_event events[32];
    const int count = epoll_wait(poll_fd_, events, 32, -1);
    for (int i = 0; i < count; ++i) {
      if (events[i].data.u64 == 0) return;
      raise(events[i].data.u64);
    }
  }
}

void IrqFds::raise(u64 token) {
  std::lock_guard lock(mutex_);
  const auto entry = std::ranges::find(entries_, token, &Entry::token);
  if (entry == entries_.end() || !entry->event.consume()) return;
  if (entry->resampler)
    routing_.set_irq(entry->gsi, true, irqchip::irq_source_resample);
  else
    routing_.pulse_irq(entry->gsi);
}

}  // namespace anykvm::vm
