//! How an agent logs in: the files of a ServiceAccount where kubelet would mount them, or a kubeconfig.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::pki::Identity;
use super::{KubeServer, write_secret};
use crate::agent::{AgentOptions, find_binary};
use crate::error::{Context as _, Result};

/// A ServiceAccount in the namespace of `deploy/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// A folder with `token` and `ca.crt`, as kubelet keeps one for each pod.
#[derive(Clone, Debug)]
pub struct Mounted {
    dir: PathBuf,
    program: PathBuf,
}

/// What a kubeconfig says about the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterEntry {
    /// Its URL.
    pub server: String,
    /// Fields beside it, `certificate-authority` among them.
    pub fields: Value,
}

/// Credentials of a kubeconfig.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// The token itself.
    Token(String),
    /// A file that holds the token.
    TokenFile(PathBuf),
    /// Files with certificate and key.
    Certificate(Identity),
}

impl Account {
    /// Its name as a user.
    pub fn user(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }

    /// The object.
    pub fn object(&self) -> Value {
        let metadata = json!({ "namespace": self.namespace, "name": self.name });
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata })
    }

    /// A token for an hour. When it is bound to a Secret of this name, the token ends with the Secret.
    pub fn token(&self, server: &KubeServer, bound_to: Option<&str>) -> Result<String> {
        let mut spec = json!({ "expirationSeconds": 3600 });
        if let Some(secret) = bound_to {
            spec["boundObjectRef"] = json!({ "apiVersion": "v1", "kind": "Secret", "name": secret });
        }
        let path = format!("/api/v1/namespaces/{}/serviceaccounts/{}/token", self.namespace, self.name);
        let body = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec });
        let answer = server.client().post(&path, &body)?;
        Ok(answer["status"]["token"].as_str().unwrap_or_default().to_owned())
    }
}

impl Mounted {
    /// Writes the folder of an account with this token under a name that is free.
    pub fn new(server: &KubeServer, name: &str, token: &str) -> Result<Self> {
        let dir = server.dir().join(name);
        fs::create_dir(&dir).context(|| format!("create {}", dir.display()))?;
        let program = server.dir().join(format!("{name}.sh"));
        let mounted = Self { dir, program };
        mounted.set_token(token)?;
        write_secret(&mounted.dir.join("ca.crt"), server.authority().pem())?;
        mounted.write_program()?;
        Ok(mounted)
    }

    /// Puts another token in place of the last in one step, as kubelet does.
    pub fn set_token(&self, token: &str) -> Result<()> {
        let draft = self.dir.join("..token");
        write_secret(&draft, token)?;
        fs::rename(&draft, self.dir.join("token")).context(|| format!("rename {}", draft.display()))
    }

    /// An agent that finds the folder where a pod finds it, and is told these URLs.
    pub fn options(&self, apiservers: &str) -> AgentOptions {
        AgentOptions { binary: Some(self.program.clone()), ..kube_options() }.args(["--apiserver", apiservers])
    }

    /// A program that is the agent with the folder mounted, for it alone. Its process becomes the agent's.
    fn write_program(&self) -> Result<()> {
        let agent = find_binary()?;
        let (dir, agent) = (self.dir.display(), agent.display());
        let script = format!(
            r#"#!/bin/sh
# Commands other than `run` need no login.
[ "$1" = run ] || exec "{agent}" "$@"
exec unshare --mount sh -ec '
  mount --bind "$0" /mnt
  mount -t tmpfs -o mode=0755 none /run
  place=/var/run/secrets/kubernetes.io/serviceaccount
  mkdir -p $place
  mount --bind /mnt $place
  exec "$@"' "{dir}" "{agent}" "$@"
"#
        );
        let write = || {
            fs::write(&self.program, script)?;
            fs::set_permissions(&self.program, fs::Permissions::from_mode(0o700))
        };
        write().context(|| format!("write {}", self.program.display()))
    }
}

impl ClusterEntry {
    /// A server that is verified by this authority's file.
    pub fn verified(server: &KubeServer, authority: &Path) -> Self {
        Self { server: server.url(), fields: json!({ "certificate-authority": authority }) }
    }
}

/// Writes a kubeconfig under a name that is free, with the files it names.
pub fn kubeconfig(server: &KubeServer, name: &str, cluster: &ClusterEntry, user: &Credentials) -> Result<PathBuf> {
    let path = server.dir().join(format!("{name}.kubeconfig"));
    let user = match user {
        Credentials::Token(token) => json!({ "token": token }),
        Credentials::TokenFile(file) => json!({ "tokenFile": file }),
        Credentials::Certificate(identity) => {
            let [certificate, key] = ["crt", "key"].map(|ending| server.dir().join(format!("{name}.{ending}")));
            write_secret(&certificate, &identity.certificate)?;
            write_secret(&key, &identity.key)?;
            json!({ "client-certificate": certificate, "client-key": key })
        }
    };
    let mut cluster_fields = cluster.fields.clone();
    cluster_fields["server"] = cluster.server.clone().into();
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "c", "cluster": cluster_fields }],
        "users": [{ "name": "u", "user": user }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    });
    write_secret(&path, &config.to_string())?;
    Ok(path)
}

/// An agent that watches an API server; how it logs in is to be added.
pub fn kube_options() -> AgentOptions {
    AgentOptions { source: "kube".to_owned(), ..AgentOptions::dir(Path::new("/")) }
}
