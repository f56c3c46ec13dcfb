//! What becomes of a packet, by a plain reading of the rules (docs/dataplane.md, docs/architecture.md, docs/parity.md):
//! [`Model`] is slow and simple, and has no code in common with the engine that it judges. Beside it stand Services and
//! packets that a generator chooses ([`case`]), and the comparison of the model with whatever handles packets ([`run`],
//! [`campaign`]).
pub mod campaign;
pub mod case;
mod chance;
mod flows;
pub mod fuzz;
mod generate;
mod model;
mod refusal;
mod rules;
pub mod run;
mod seen;
mod translate;
pub mod words;
mod world;

pub use generate::{Scope, cases};
pub use model::Model;
pub use rules::RULES;
pub use world::World;
