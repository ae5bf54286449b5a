//! The port behind which the policy maps lie.

use super::tables::{Op, PolicyTables};

/// Something that holds [`PolicyTables`]: the kernel's maps, or a fake.
pub trait PolicyDataplane {
    /// Why it could not.
    type Error: std::error::Error;

    /// Reads everything back. Called once after the start, and when it is not certain what the maps hold.
    fn load_policy(&mut self) -> Result<PolicyTables, Self::Error>;

    /// Does the row of some pod's interface say that policies are enforced: that the pod is isolated, or held? Asked at the
    /// start, of what the agent before has written.
    fn enforced(&mut self) -> Result<bool, Self::Error>;

    /// Does one operation. It may be one that was done before; deleting the absent succeeds. After an error the row is
    /// taken to be old or new, either.
    fn apply_policy(&mut self, op: &Op) -> Result<(), Self::Error>;

    /// Does operations in their order, up to the first that fails: how many succeeded, and why the next one did not.
    fn apply_policies(&mut self, ops: &[Op]) -> (usize, Option<Self::Error>) {
        for (done, op) in ops.iter().enumerate() {
            if let Err(error) = self.apply_policy(op) {
                return (done, Some(error));
            }
        }
        (ops.len(), None)
    }
}
