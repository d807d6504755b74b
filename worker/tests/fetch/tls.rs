//! A server under an authority of one's own.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::routing::get;
use axum::serve::Listener;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::harness::Fetch;

struct Tls {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for Tls {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, address) = self.listener.accept().await.unwrap();
            // Who does not trust us hangs up.
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A server for `localhost`, and its authority as PEM.
async fn start() -> (SocketAddr, String) {
    let authority_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let issuer = Issuer::new(params, authority_key);
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let config = versions.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tls = Tls { listener, acceptor: TlsAcceptor::from(Arc::new(config)) };
    let router = Router::new().route("/a.gguf", get(|| async { "weights" }));
    tokio::spawn(async move { axum::serve(tls, router).await.unwrap() });
    (address, authority.pem())
}

/// A proxy, and how many tunnels went through it.
async fn proxy() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, tunnels) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = tunnels.clone();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(client.read_u8().await.unwrap());
            }
            let request = String::from_utf8(request).unwrap();
            let to = request.strip_prefix("CONNECT ").unwrap().split(' ').next().unwrap();
            let mut server = TcpStream::connect(to.replace("localhost", "127.0.0.1")).await.unwrap();
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut server).await });
        }
    });
    (address, tunnels)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_of_one_s_own_is_trusted_when_it_is_named() {
    let (address, authority) = start().await;
    let url = format!("https://localhost:{}/a.gguf", address.port());
    let log = Fetch::new(&["--url", &url]).fails(78).await;
    assert!(log.contains("is not trusted") && log.contains("--ca-bundle"), "{log}");
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("ca.pem");
    std::fs::write(&bundle, authority).unwrap();
    let fetch = Fetch::new(&["--url", &url, "--ca-bundle", bundle.to_str().unwrap()]);
    fetch.succeeds().await;
    assert_eq!(fetch.read("a.gguf"), b"weights");
    let (proxy, tunnels) = proxy().await;
    let fetch = Fetch::new(&["--url", &url, "--ca-bundle", bundle.to_str().unwrap()]).env("HTTPS_PROXY", &format!("http://{proxy}"));
    fetch.succeeds().await;
    assert_eq!(fetch.read("a.gguf"), b"weights");
    assert!(tunnels.load(Ordering::Relaxed) > 0);
}
