//! CPUID for KVM: the machine's policy, less what this KVM cannot do.

use kvm_bindings as kvm;
use kvm_ioctls::Kvm;
use paravane_cpu::CpuState;
use paravane_cpu::cpuid::CpuidPolicy;

use super::KvmError;

/// Removes from `policy` what KVM_GET_SUPPORTED_CPUID does not offer.
pub(super) fn restrict(kvm: &Kvm, policy: &mut CpuidPolicy) -> Result<(), KvmError> {
    let list = kvm
        .get_supported_cpuid(kvm::KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| KvmError::refused("KVM_GET_SUPPORTED_CPUID", e))?;
    policy.restrict(|leaf, sub| {
        let e = list.as_slice().iter().find(|e| e.function == leaf && e.index == sub);
        e.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    });
    Ok(())
}

/// The table for KVM_SET_CPUID2 of vCPU `id`.
pub(super) fn table(policy: &CpuidPolicy, id: u32) -> Result<kvm::CpuId, KvmError> {
    let st = CpuState::reset(id);
    let entries: Vec<_> = policy
        .leaves()
        .map(|(function, index)| {
            let [eax, ebx, ecx, edx] = policy.query(&st, function, index);
            let flags = if CpuidPolicy::has_subleaves(function) { kvm::KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            kvm::kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
        })
        .collect();
    kvm::CpuId::from_entries(&entries).map_err(|_| KvmError::Transfer("CPUID"))
}
