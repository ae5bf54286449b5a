//! The agent's end of the conversation.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::Path;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::{Answer, DEADLINE, Question, address};

/// Longer questions are not read.
const LONGEST: u64 = 64 * 1024;

/// A question, and the way back.
#[derive(Debug)]
pub struct Inquiry {
    /// The question.
    pub question: Question,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Answer>,
}

/// Listens in a task of the current runtime, for as long as somebody takes the inquiries.
pub fn answer_questions(pin_root: &Path, inquiries: mpsc::Sender<Inquiry>) -> io::Result<()> {
    let listener = StdListener::bind_addr(&address(pin_root)?)?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = inquiries.closed() => return,
            };
            match accepted {
                Ok((stream, _)) => drop(tokio::spawn(serve(stream, inquiries.clone()))),
                Err(error) => {
                    // Out of descriptors: those of others come back.
                    tracing::debug!(%error, "a question was not taken");
                    tokio::task::yield_now().await;
                }
            }
        }
    });
    Ok(())
}

async fn serve(stream: UnixStream, inquiries: mpsc::Sender<Inquiry>) {
    match timeout(DEADLINE, converse(stream, inquiries)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a question was not answered"),
        Err(_) => tracing::debug!("a question was not answered in time"),
    }
}

async fn converse(mut stream: UnixStream, inquiries: mpsc::Sender<Inquiry>) -> io::Result<()> {
    // Names of pods and policies are for root, as the maps are.
    if stream.peer_cred()?.uid() != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let mut line = String::new();
    BufReader::new((&mut stream).take(LONGEST)).read_line(&mut line).await?;
    let question = serde_json::from_str(&line)?;
    let (reply, answer) = oneshot::channel();
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    inquiries.send(Inquiry { question, reply }).await.map_err(|_| gone())?;
    let mut line = serde_json::to_vec(&answer.await.map_err(|_| gone())?)?;
    line.push(b'\n');
    stream.write_all(&line).await
}
