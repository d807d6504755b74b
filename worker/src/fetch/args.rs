//! Where a model comes from and where it goes.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use carryon_crds::names;

/// A secret: it is not printed.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// The value of an `Authorization` header.
    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// A Secret or a variable without content is no token.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for Token {
    fn from(text: &str) -> Self {
        // A file or a Secret often ends with a line end, which is not part of the token.
        Self(text.trim().to_owned())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Token(…)")
    }
}

/// `carryon-worker fetch`.
#[derive(Clone, Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["hugging_face", "url"])))]
#[command(group(clap::ArgGroup::new("place").required(true).args(["output", "cache"])))]
pub struct FetchArgs {
    /// Repository of a Hugging Face hub: OWNER/NAME.
    #[arg(long, value_name = "OWNER/NAME")]
    pub hugging_face: Option<String>,
    /// Branch, tag or commit of the repository. A folder keeps the commit that it began with.
    #[arg(long, default_value = "main", requires = "hugging_face")]
    pub revision: String,
    /// Address of the hub.
    #[arg(long, env = "HF_ENDPOINT", default_value = "https://huggingface.co")]
    pub endpoint: String,
    /// Token for the hub.
    #[arg(long, env = "HF_TOKEN", hide = true, hide_env_values = true, value_parser = |text: &str| Ok::<_, String>(Token::from(text)))]
    pub token: Option<Token>,
    /// Bucket and prefix (s3://, gs://, az://; credentials as the cloud's own tools take them from the environment), or https:// address of
    /// a file, or of a folder (with / at its end).
    #[arg(long)]
    pub url: Option<String>,
    /// Files to fetch instead of those that a model needs: names or patterns, such as `*Q4_K_M.gguf`; `*` stands for no `/`.
    #[arg(long, num_args = 1..)]
    pub files: Vec<String>,
    /// The text part of a model of text and images is wanted: one that a pool could run so is not refused.
    #[arg(long)]
    pub text_only: bool,
    /// PEM file with certificate authorities to trust beside those of the system.
    #[arg(long)]
    pub ca_bundle: Option<PathBuf>,
    /// Folder that will hold the files.
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// Folder of many models, instead: this one gets a folder in it that is named by source and commit.
    #[arg(long, requires = "link")]
    pub cache: Option<PathBuf>,
    /// Link that will lead to the model in the cache: to its folder, or to its GGUF file.
    #[arg(long, requires = "cache")]
    pub link: Option<PathBuf>,
    /// Commit that the revision was resolved to, where that was done before.
    #[arg(long, env = names::MODEL_COMMIT, hide = true)]
    pub commit: Option<String>,
    /// Address at which `/progress` says how far it is.
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    /// File of the last words.
    #[arg(long)]
    pub termination_log: Option<PathBuf>,
    /// Files that are fetched at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub parallel: u16,
}
