//! Connections to sources, through proxies where the environment names some.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioIo;
use tower::Service;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(20);

/// Connects, through a proxy where the environment names one for the address.
#[derive(Clone, Debug)]
pub struct Dial {
    direct: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Default for Dial {
    fn default() -> Self {
        let mut direct = HttpConnector::new();
        direct.enforce_http(false);
        direct.set_connect_timeout(Some(CONNECT));
        direct.set_nodelay(true);
        Self { direct, proxies: Arc::new(Matcher::from_env()) }
    }
}

impl Service<Uri> for Dial {
    type Response = TokioIo<tokio::net::TcpStream>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.direct.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        // What is not encrypted is for networks of one's own, where no proxy is.
        let proxy = if to.scheme_str() == Some("https") { self.proxies.intercept(&to) } else { None };
        let mut direct = self.direct.clone();
        match proxy {
            Some(proxy) => {
                let tunnel = Tunnel::new(proxy.uri().clone(), direct);
                let mut tunnel = match proxy.basic_auth() {
                    Some(auth) => tunnel.with_auth(auth.clone()),
                    None => tunnel,
                };
                Box::pin(async move { tunnel.call(to).await.map_err(|error| format!("proxy {}: {error}", proxy.uri()).into()) })
            }
            None => Box::pin(async move { direct.call(to).await.map_err(Into::into) }),
        }
    }
}
