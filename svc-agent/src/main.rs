use std::process::ExitCode;

use clap::Parser as _;
use svc_agent::cli::Cli;

fn main() -> ExitCode {
    Cli::parse().run()
}
