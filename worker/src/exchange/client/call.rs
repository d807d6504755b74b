//! One request, in a form that can be sent more than once.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::stream::{StreamExt as _, iter, try_unfold};
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Body, Method, RequestBuilder};
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;

use super::open::OpenBody;

/// Bytes of a file that are read at a time.
const READ_BYTES: usize = 1 << 20;

/// A request but for where it is sent.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub method: Method,
    pub path: String,
    pub headers: Vec<(&'static str, String)>,
    pub payload: Payload,
}

/// What is sent in a body.
#[derive(Clone, Debug)]
pub enum Payload {
    /// These pieces, one after the other.
    Pieces(Vec<Bytes>),
    /// A file, read as it is sent: it need not fit into memory.
    File {
        /// Where it is.
        path: PathBuf,
        /// Its bytes.
        length: u64,
    },
    /// One that goes on while it is answered; it cannot be sent again.
    Open(OpenBody),
}

impl Payload {
    /// The file at `path`, as long as it is now.
    ///
    /// # Errors
    /// It cannot be inspected.
    pub fn file(path: &Path) -> std::io::Result<Self> {
        Ok(Self::File { path: path.to_owned(), length: std::fs::metadata(path)?.len() })
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self::from(Bytes::from(bytes))
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self::Pieces(vec![bytes])
    }
}

impl Call {
    pub fn get(path: &str) -> Self {
        Self { method: Method::GET, path: path.to_owned(), headers: Vec::new(), payload: Payload::Pieces(Vec::new()) }
    }

    pub fn post(path: &str, media_type: &str, payload: Payload) -> Self {
        Self { method: Method::POST, headers: vec![("content-type", media_type.to_owned())], payload, ..Self::get(path) }
    }

    pub fn json<T: serde::Serialize>(path: &str, request: &T) -> Self {
        // Our requests are plain structs: writing them cannot fail, and an empty body would be refused by name.
        Self::post(path, "application/json", serde_json::to_vec(request).unwrap_or_default().into())
    }

    pub fn what(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    /// Whether the answer says what a pod knows at once. Others compute, or take a while to be sent.
    pub fn is_quick(&self) -> bool {
        matches!(self.method, Method::GET | Method::DELETE)
    }

    /// Puts headers and body on a request.
    pub fn fill(&self, mut request: RequestBuilder) -> RequestBuilder {
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        match &self.payload {
            Payload::Pieces(pieces) if pieces.is_empty() => request,
            Payload::Pieces(pieces) => match pieces.as_slice() {
                [one] => request.body(one.clone()),
                // A pool that has no room for it says so before it is sent.
                pieces => request
                    .header(CONTENT_LENGTH, pieces.iter().map(Bytes::len).sum::<usize>())
                    .body(Body::wrap_stream(iter(pieces.to_vec()).map(Ok::<_, std::io::Error>))),
            },
            Payload::Open(body) => request.body(body.take()),
            Payload::File { path, length } => request.header(CONTENT_LENGTH, *length).body(read(path.clone())),
        }
    }
}

/// The file as a body.
fn read(path: PathBuf) -> Body {
    Body::wrap_stream(try_unfold(None, move |file: Option<File>| {
        let path = path.clone();
        async move {
            let mut file = match file {
                Some(file) => file,
                None => File::open(&path).await?,
            };
            let mut bytes = Vec::with_capacity(READ_BYTES);
            (&mut file).take(READ_BYTES as u64).read_to_end(&mut bytes).await?;
            Ok::<_, std::io::Error>((!bytes.is_empty()).then(|| (Bytes::from(bytes), Some(file))))
        }
    }))
}
