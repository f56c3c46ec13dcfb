//! What a debug build of the kernel part says, as lines of the agent's log.
use anyhow::Context as _;
use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Within a runtime, and for as long as it runs.
///
/// # Errors
/// Where the kernel part has nothing to say, or its buffer cannot be waited for.
pub fn forward(mut ebpf: Ebpf) -> anyhow::Result<Ebpf> {
    let logger = EbpfLogger::init(&mut ebpf).context("opening the kernel part's log")?;
    // SAFETY: the buffer's descriptor is the logger's own, and stays the same as long as it lives.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
        .context("waiting for the kernel part's log")?;
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(ebpf)
}
