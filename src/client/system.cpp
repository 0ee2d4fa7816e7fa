// Kvm: version check, capability predicates, cached lists.
#include "anykvm/system.h"

#include <cerrno>
#include <mutex>
#include <optional>

#include "anykvm/kvm.h"
#include "anykvm/vm.h"
#include "client/flexible.h"

namespace anykvm {

struct Kvm::State {
  KvmHandle handle;
  std::size_t vcpu_mmap_size = 0;

  std::mutex caches;
  std::optional<std::vector<kvm_cpuid_entry2>> supported_cpuid;
  std::optional<std::vector<std::uint32_t>> supported_msrs;
  std::optional<std::vector<std::uint32_t>> feature_msrs;

  const std::vector<std::uint32_t>& msr_list(std::optional<std::vector<std::uint32_t>>& cache, const char* name,
                                             unsigned long request);
};

namespace {

KvmHandle open_device(std::shared_ptr<KvmDevice> device) {
  const int fd = device->open_system();
  if (fd < 0) throw KvmError(-fd, "open of the KVM device");
  return {std::move(device), fd};
}

}  // namespace

Kvm::Kvm(std::shared_ptr<KvmDevice> device) : state_(new State{open_device(std::move(device))}) {
  if (state_->handle.ioctl("KVM_GET_API_VERSION", KVM_GET_API_VERSION) != KVM_API_VERSION)
    throw KvmError(ENOTSUP, "KVM_GET_API_VERSION");
  state_->vcpu_mmap_size = std::size_t(state_->handle.ioctl("KVM_GET_VCPU_MMAP_SIZE", KVM_GET_VCPU_MMAP_SIZE));
}

Kvm::~Kvm() = default;
Kvm::Kvm(Kvm&&) noexcept = default;
Kvm& Kvm::operator=(Kvm&&) noexcept = default;

int Kvm::api_version() const { return KVM_API_VERSION; }
std::size_t Kvm::vcpu_mmap_size() const { return state_->vcpu_mmap_size; }
const KvmHandle& Kvm::handle() const { return state_->handle; }

int Kvm::check_extension(long capability) const {
  const long result = state_->handle.try_ioctl(KVM_CHECK_EXTENSION, static_cast<unsigned long>(capability));
  return result < 0 ? 0 : int(result);
}

bool Kvm::cap_user_memory() const { return check_extension(KVM_CAP_USER_MEMORY); }
bool Kvm::cap_set_tss_address() const { return check_extension(KVM_CAP_SET_TSS_ADDR); }
bool Kvm::cap_set_identity_map_address() const { return check_extension(KVM_CAP_SET_IDENTITY_MAP_ADDR); }
bool Kvm::cap_extended_cpuid() const { return check_extension(KVM_CAP_EXT_CPUID); }
bool Kvm::cap_user_nmi() const { return check_extension(KVM_CAP_USER_NMI); }
int Kvm::cap_coalesced_mmio() const { return check_extension(KVM_CAP_COALESCED_MMIO); }
int Kvm::cap_memory_slots() const { return check_extension(KVM_CAP_NR_MEMSLOTS); }
bool Kvm::cap_readonly_memory() const { return check_extension(KVM_CAP_READONLY_MEM); }
bool Kvm::cap_irq_chip() const { return check_extension(KVM_CAP_IRQCHIP); }
bool Kvm::cap_pit2() const { return check_extension(KVM_CAP_PIT2); }
bool Kvm::cap_irq_routing() const { return check_extension(KVM_CAP_IRQ_ROUTING); }
bool Kvm::cap_signal_msi() const { return check_extension(KVM_CAP_SIGNAL_MSI); }
bool Kvm::cap_irqfd() const { return check_extension(KVM_CAP_IRQFD); }
bool Kvm::cap_ioeventfd() const { return check_extension(KVM_CAP_IOEVENTFD); }
bool Kvm::cap_vcpu_events() const { return check_extension(KVM_CAP_VCPU_EVENTS); }
bool Kvm::cap_debug_registers() const { return check_extension(KVM_CAP_DEBUGREGS); }
bool Kvm::cap_xcrs() const { return check_extension(KVM_CAP_XCRS); }
bool Kvm::cap_xsave() const { return check_extension(KVM_CAP_XSAVE); }
bool Kvm::cap_immediate_exit() const { return check_extension(KVM_CAP_IMMEDIATE_EXIT); }
bool Kvm::cap_mp_state() const { return check_extension(KVM_CAP_MP_STATE); }
bool Kvm::cap_get_tsc_khz() const { return check_extension(KVM_CAP_GET_TSC_KHZ); }
bool Kvm::cap_tsc_control() const { return check_extension(KVM_CAP_TSC_CONTROL); }
bool Kvm::cap_adjust_clock() const { return check_extension(KVM_CAP_ADJUST_CLOCK); }
bool Kvm::cap_one_reg() const { return check_extension(KVM_CAP_ONE_REG); }
int Kvm::cap_recommended_vcpus() const { return check_extension(KVM_CAP_NR_VCPUS); }
int Kvm::cap_max_vcpus() const {
  const int most = check_extension(KVM_CAP_MAX_VCPUS);
  return most ? most : cap_recommended_vcpus();
}

const std::vector<kvm_cpuid_entry2>& Kvm::supported_cpuid() const {
  const std::scoped_lock lock(state_->caches);
  auto& cache = state_->supported_cpuid;
  // KVM tells that the buffer is too small, not by how much.
  for (std::size_t room = 128; !cache; room *= 2) {
    Flexible<kvm_cpuid2, kvm_cpuid_entry2> list(room);
    list->nent = std::uint32_t(room);
    const long result = state_->handle.try_ioctl(KVM_GET_SUPPORTED_CPUID, list.header());
    if (result == -E2BIG && room < 65536) continue;
    if (result < 0) throw KvmError(int(-result), "KVM_GET_SUPPORTED_CPUID");
    const auto entries = list.entries(list->nent);
    cache.emplace(entries.begin(), entries.end());
  }
  return *cache;
}

const std::vector<std::uint32_t>& Kvm::State::msr_list(std::optional<std::vector<std::uint32_t>>& cache,
                                                       const char* name, unsigned long request) {
  const std::scoped_lock lock(caches);
  // With no room KVM answers E2BIG and the number of entries.
  for (std::uint32_t room = 0; !cache;) {
    Flexible<kvm_msr_list, std::uint32_t> list(room);
    list->nmsrs = room;
    const long result = handle.try_ioctl(request, list.header());
    if (result == -E2BIG && list->nmsrs > room) {
      room = list->nmsrs;
      continue;
    }
    if (result < 0) throw KvmError(int(-result), name);
    const auto entries = list.entries(list->nmsrs);
    cache.emplace(entries.begin(), entries.end());
  }
  return *cache;
}

const std::vector<std::uint32_t>& Kvm::supported_msrs() const {
  return state_->msr_list(state_->supported_msrs, "KVM_GET_MSR_INDEX_LIST", KVM_GET_MSR_INDEX_LIST);
}

const std::vector<std::uint32_t>& Kvm::feature_msrs() const {
  return state_->msr_list(state_->feature_msrs, "KVM_GET_MSR_FEATURE_INDEX_LIST", KVM_GET_MSR_FEATURE_INDEX_LIST);
}

Vm Kvm::create_vm(unsigned long type) const {
  for (;;) {
    const long fd = state_->handle.try_ioctl(KVM_CREATE_VM, type);
    if (fd == -EINTR) continue;  // the kernel gives up on a pending signal, which need not be about this call
    if (fd < 0) throw KvmError(int(-fd), "KVM_CREATE_VM");
    return Vm({state_->handle.device(), int(fd)}, state_->vcpu_mmap_size);
  }
}

}  // namespace anykvm
