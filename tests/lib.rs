//! Tests that need root and a kernel: `cargo xtask test` runs them, see CONTRIBUTING.md.
pub mod cluster;
pub mod kernel;
pub mod operations;
pub mod test_run;
