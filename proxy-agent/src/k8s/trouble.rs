//! What can go wrong in the conversation with an API server, by kind: for counters, for the log, for what to do next.

use std::error::Error;
use std::io;

use hyper_util::client::legacy;
use kube::runtime::watcher;

use super::transport::TransportError;

/// A kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trouble {
    /// 401: the credentials are not accepted.
    Unauthorized,
    /// 403: the credentials are accepted and do not suffice.
    Forbidden,
    /// 410: the server has forgotten the version from which the watch wanted to go on.
    Expired,
    /// 429: the server asks for less.
    TooManyRequests,
    /// 5xx: the server has a problem of its own.
    Server,
    /// No connection, or one that broke.
    Unreachable,
    /// A connection, and no answer in time.
    Silent,
    /// The server's certificate is not accepted, or ours is not.
    Tls,
    /// Our credentials cannot be read or used.
    Credentials,
    /// An answer that is not understood.
    Garbled,
    /// Any other refusal.
    Refused,
}

impl Trouble {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 11] = [
        Self::Unauthorized,
        Self::Forbidden,
        Self::Expired,
        Self::TooManyRequests,
        Self::Server,
        Self::Unreachable,
        Self::Silent,
        Self::Tls,
        Self::Credentials,
        Self::Garbled,
        Self::Refused,
    ];

    pub(super) const fn index(self) -> usize {
        self as usize
    }

    /// Label of its counter.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::Expired => "expired",
            Self::TooManyRequests => "too_many_requests",
            Self::Server => "server",
            Self::Unreachable => "unreachable",
            Self::Silent => "silent",
            Self::Tls => "tls",
            Self::Credentials => "credentials",
            Self::Garbled => "garbled",
            Self::Refused => "refused",
        }
    }

    /// What a person can do about it.
    pub const fn fix(self) -> &'static str {
        match self {
            Self::Unauthorized => "renew the token or client certificate; the files are read again by themselves",
            Self::Forbidden => "give the agent's user get, list and watch on this kind: see the ClusterRole in deploy/",
            Self::Expired => "nothing to do, the objects are listed anew; if it goes on, look at the server's etcd",
            Self::TooManyRequests => "nothing to do for a while; if it goes on, look at API Priority and Fairness",
            Self::Server => "look at the API server's log",
            Self::Unreachable | Self::Silent => {
                "check --apiserver and the way there; the in-cluster address works only once a proxy runs"
            }
            Self::Tls => "check the CA and the names in the server's certificate",
            Self::Credentials => "check token, certificate and key files, or the exec plugin",
            Self::Garbled => "check that the address is that of an API server, and its version",
            Self::Refused => "look at the message; the address may not be that of an API server",
        }
    }

    pub(super) fn of(error: &watcher::Error) -> Self {
        match error {
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => Self::of_client(error),
            watcher::Error::WatchError(status) => Self::of_status(status.code),
            watcher::Error::NoResourceVersion => Self::Garbled,
        }
    }

    /// Of an error of the client.
    pub(super) fn of_client(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(status.code),
            kube::Error::SerdeError(_) | kube::Error::FromUtf8(_) | kube::Error::LinesCodecMaxLineLengthExceeded => {
                Self::Garbled
            }
            kube::Error::Auth(_) | kube::Error::RustlsTls(_) | kube::Error::InferKubeconfig(_) => Self::Credentials,
            other => Self::of_chain(other).unwrap_or(Self::Unreachable),
        }
    }

    const fn of_status(code: u16) -> Self {
        match code {
            401 => Self::Unauthorized,
            403 => Self::Forbidden,
            410 => Self::Expired,
            429 => Self::TooManyRequests,
            500..=599 => Self::Server,
            _ => Self::Refused,
        }
    }

    /// Looks for the cause that says most.
    fn of_chain(error: &(dyn Error + 'static)) -> Option<Self> {
        let here = if error.is::<rustls::Error>() {
            Some(Self::Tls)
        } else if let Some(error) = error.downcast_ref::<TransportError>() {
            Some(error.trouble())
        } else if error.is::<kube::client::AuthError>() {
            Some(Self::Credentials)
        } else {
            None
        };
        // An I/O error hides what it wraps from `source`.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let wrapped = wrapped.and_then(|inner| Self::of_chain(inner));
        let further = || error.source().and_then(Self::of_chain);
        here.or(wrapped).or_else(further).or_else(|| error.is::<legacy::Error>().then_some(Self::Unreachable))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_follow_the_order() {
        for (at, trouble) in Trouble::ALL.into_iter().enumerate() {
            assert_eq!(trouble.index(), at, "{trouble:?}");
        }
    }

    #[test]
    fn the_cause_that_says_most_decides() {
        let tls = || io::Error::new(io::ErrorKind::InvalidData, rustls::Error::DecryptError);
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let nested = |inner: io::Error| kube::Error::Service(Box::new(io::Error::other(inner)));
        let rows = [
            (kube::Error::Service(Box::new(tls())), Trouble::Tls),
            (nested(tls()), Trouble::Tls),
            (kube::Error::ReadEvents(tls()), Trouble::Tls),
            (kube::Error::Service(Box::new(refused())), Trouble::Unreachable),
            (nested(refused()), Trouble::Unreachable),
            (kube::Error::ReadEvents(refused()), Trouble::Unreachable),
        ];
        for (error, want) in rows {
            assert_eq!(Trouble::of_client(&error), want, "{error:?}");
        }
        let codes = [
            (401, Trouble::Unauthorized),
            (403, Trouble::Forbidden),
            (404, Trouble::Refused),
            (410, Trouble::Expired),
            (429, Trouble::TooManyRequests),
            (503, Trouble::Server),
        ];
        for (code, want) in codes {
            assert_eq!(Trouble::of_status(code), want, "{code}");
        }
    }
}
