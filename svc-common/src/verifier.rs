//! What keeps the compiler from writing code that the kernel's verifier does not follow.

/// Zeros, a word each. Of zeros that the compiler knows it makes a call of a function that writes byte by byte.
#[inline(always)]
pub fn zeros<const N: usize>() -> [u64; N] {
    core::array::from_fn(|_| opaque(0))
}

/// The same number, of which the compiler is to know nothing.
#[inline(always)]
pub fn opaque(word: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    let word = {
        let mut word = word;
        // SAFETY: a register moved to itself. An instruction there has to be: the kernel refuses two line infos of one.
        unsafe { core::arch::asm!("{0} = {0}", inlateout(reg) word, options(pure, nomem, nostack)) };
        word
    };
    word
}

/// [`opaque`], made anew each time that it is asked for: what is known by then is not kept on the stack for later.
#[inline(always)]
pub fn anew(word: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    let word = {
        let mut word = word;
        // SAFETY: as above.
        unsafe { core::arch::asm!("{0} = {0}", inlateout(reg) word, options(nomem, nostack)) };
        word
    };
    word
}
