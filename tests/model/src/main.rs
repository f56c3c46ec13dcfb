//! The engine over memory beside the model, on and on: `cargo xtask fuzz`.
use std::process::ExitCode;

use clap::Parser;
use svc_model::Scope;
use svc_model::fuzz::{Options, engine, run};

fn main() -> ExitCode {
    run(&Options::parse(), Scope::Memory, engine)
}
