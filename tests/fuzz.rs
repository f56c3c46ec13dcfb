//! The kernel's programs beside the model, on and on: `cargo xtask fuzz --kernel`.
use std::process::ExitCode;

use clap::Parser;
use svc_model::Scope;
use svc_model::fuzz::{Options, run};
use svc_tests::kernel;

fn main() -> ExitCode {
    run(&Options::parse(), Scope::Kernel, kernel::check)
}
