//! What makes the agent kube-proxy to those who knew kube-proxy: its configuration, its flags, and its leavings.
//!
//! ```text
//!   file (KubeProxyConfiguration) ─ config ─┐
//!                                           ├─ settings ──▶ Settings, warnings   or a refusal with file, line, field
//!   flags of the same names ──── flags ─────┘
//!   the file again ── reload ──▶ valid: end for a restart · invalid: the old one stays
//! ```

pub mod cleanup;
pub mod config;
pub mod flags;
pub mod leavings;
pub mod reload;
pub mod settings;
pub mod sysctl;
pub mod value;

pub use config::KubeProxyConfiguration;
pub use flags::Flags;
pub use settings::Settings;
