//! The chat template of a checkpoint: where it is written, and what becomes of one that cannot be used.

use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::{BaseConfig, ExitCode, digest};
use carryon_worker::base;
use serde_json::json;
use tokio::net::TcpListener;

use crate::harness::{ENGINE, Pool, checkpoint};

/// `tokenizer_config.json` with this `chat_template`.
fn settings(folder: &Path, template: serde_json::Value) {
    std::fs::write(folder.join("tokenizer_config.json"), json!({"chat_template": template}).to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_cannot_be_used_is_the_pool_s_error_and_final() {
    for (template, reason) in [
        ("{% for m in messages %}", "unusable chat template: "),
        ("{% unknown %}", "unusable chat template: "),
        ("{{ messages | nofilter }}", "unusable chat template: unknown filter"),
    ] {
        let folder = checkpoint(7);
        settings(folder.path(), template.into());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = BaseConfig { name: "test".to_owned(), dtype: Dtype::Float32, engine: ENGINE, text_only: false };
        let error = base::serve(
            listener,
            config,
            folder.path().to_owned(),
            base::Placement::cpu(1),
            std::time::Duration::ZERO,
            std::future::pending(),
        )
        .await
        .unwrap_err();
        let expect = format!("failed to load the chat template of {:?}: {reason}", folder.path());
        assert!(error.to_string().starts_with(&expect), "{error}");
        assert_eq!(error.exit_code(), ExitCode::Configuration);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_templates_one_is_the_default_and_one_is_for_tools() {
    let folder = checkpoint(7);
    let named = json!([{"name": "tool_use", "template": "T{{ tools | tojson }}"}, {"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]);
    settings(folder.path(), named);
    let listed = Pool::start(folder.path(), Dtype::Float32, ENGINE).await.description;
    assert_eq!((listed.chat_template.as_deref(), listed.tool_use_template.as_deref()), (Some("D"), Some("T{{ tools | tojson }}")));
    assert_eq!(listed.identity.chat_template, digest(b"D\nT{{ tools | tojson }}"));

    // Files of their own come before the settings.
    std::fs::write(folder.path().join("chat_template.jinja"), "F{% generation %}{% endgeneration %}").unwrap();
    std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
    std::fs::write(folder.path().join("additional_chat_templates/tool_use.jinja"), "FT").unwrap();
    let written = Pool::start(folder.path(), Dtype::Float32, ENGINE).await.description;
    assert_eq!(written.chat_template.as_deref(), Some("F{% generation %}{% endgeneration %}"));
    assert_eq!(written.tool_use_template.as_deref(), Some("FT"));

    let folder = checkpoint(7);
    settings(folder.path(), "one".into());
    let one = Pool::start(folder.path(), Dtype::Float32, ENGINE).await.description;
    assert_eq!((one.chat_template.as_deref(), one.tool_use_template), (Some("one"), None));
    assert_eq!(one.identity.chat_template, digest(b"one"));
}
