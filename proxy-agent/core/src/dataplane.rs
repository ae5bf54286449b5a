//! The port behind which the kernel lies.

use crate::tables::{Op, Tables};

/// Something that holds [`Tables`]: the kernel's maps, or a fake.
pub trait Dataplane {
    /// Why it could not.
    type Error: std::error::Error;

    /// Reads everything back. Called once after the start, and when somebody else may have written.
    fn load(&mut self) -> Result<Tables, Self::Error>;

    /// Does one operation. It may be one that was done before; deleting the absent succeeds. After an error the row is
    /// taken to be old or new, either.
    fn apply(&mut self, op: &Op) -> Result<(), Self::Error>;

    /// Does several operations that do not depend on each other, in any order, and returns one result for each, in
    /// theirs.
    fn apply_batch(&mut self, ops: &[Op]) -> Vec<Result<(), Self::Error>> {
        ops.iter().map(|op| self.apply(op)).collect()
    }
}
