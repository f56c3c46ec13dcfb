//! What `svc-agent top` shows: pure, from what was read of the kernel and from keys to lines.
pub mod model;
pub mod rates;
pub mod view;
