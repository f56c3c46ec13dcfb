//! One line a step, as `cargo xtask` prints them.
use std::io::Write as _;
use std::time::Instant;

use anyhow::Result;

/// Does `work` under this title, and says how long it took.
pub(crate) fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("  {title:.<44} ");
    // Without a newline the line is not written by itself.
    let _ = std::io::stdout().flush();
    let start = Instant::now();
    let result = work();
    match &result {
        Ok(_) => println!("{:.1} s", start.elapsed().as_secs_f32()),
        Err(_) => println!("failed"),
    }
    result
}
