//! The manifests of `deploy/`, as JSON: what a cluster is really given.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Context as _, Error, Result};

/// The folder `deploy/` of the repository that this was built from.
pub fn deploy_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy")
}

/// The documents of a file below `deploy/`, in order.
pub fn documents(file: &str) -> Result<Vec<Value>> {
    let path = deploy_dir().join(file);
    let text = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
    let read = serde_saphyr::from_multiple::<Value>(&text);
    read.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
        .context(|| format!("parse {}", path.display()))
}

/// The only document of this kind among these.
///
/// # Errors
/// [`Error::Name`] when there is none or more than one.
pub fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Result<&'a Value> {
    let mut found = documents.iter().filter(|document| document["kind"] == kind);
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(Error::Name(format!("no {kind} in deploy/"))),
        (Some(_), Some(_)) => Err(Error::Name(format!("more than one {kind} in deploy/"))),
    }
}
