//! The chat template of a checkpoint: where it is written, and what becomes of one that cannot be used.

use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::{BaseConfig, ExitCode, digest};
use carryon_worker::base;
use carryon_worker::text::{ChatTemplate, Conversation, Message, TextError, render_apart};
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

fn compiled_apart(template: &str) -> (ChatTemplate, Conversation) {
    render_apart(env!("CARGO_BIN_EXE_carryon-worker").into());
    let conversation = Conversation { messages: vec![Message::new("user", "a")], ..Conversation::default() };
    (ChatTemplate::new(template, None, None, None).unwrap(), conversation)
}

/// Each is guarded, so that the trial which every template has to pass renders nothing of it.
const HOSTILE: &[&str] = &[
    "{{ 'x' * 1000000000 }}",
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x='xxxxxxxx') %}{% for a in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "{% macro m(a) %}{{ m(a) }}{{ m(a) }}{% endmacro %}{{ m(1) }}",
    "{{ 'aaaaaaaaaaaaaaaa'.replace('a', 'x' * 100000).replace('x', 'y' * 100000) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{% set n = namespace(x='a') %}{% for a in range(60) %}{% set n.x = [n.x, n.x] | tojson %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=[]) %}{% for a in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson(sort_keys=True) }}",
    "{% set n = namespace(x=[]) %}{% for a in range(90000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=[]) %}{% for a in range(90000) %}{% set n.x = {'a': n.x} %}{% endfor %}{{ raise_exception('deep') }}",
];

#[test]
fn a_template_can_neither_loop_nor_allocate_nor_go_deep_without_bound() {
    for template in HOSTILE {
        let (compiled, conversation) = compiled_apart(&format!("{{% if messages[0].content %}}{template}{{% endif %}}fine"));
        let refused = compiled.render(&conversation, 1, true).unwrap_err();
        println!("{template}: {refused}");
        assert!(matches!(refused, TextError::Render(_)), "{template}: {refused}");
        // Whoever asks next is answered.
        let harmless = Conversation { messages: vec![Message::new("user", "")], ..Conversation::default() };
        assert_eq!(compiled.render(&harmless, 1, true).unwrap(), "fine", "{template}");
    }
}

#[test]
fn a_renderer_that_was_ended_is_started_again() {
    let (compiled, conversation) = compiled_apart("{{ messages[0].content }}");
    let me = std::process::id().to_string();
    for _ in 0..3 {
        assert_eq!(compiled.render(&conversation, 1, true).unwrap(), "a");
        assert!(std::process::Command::new("pkill").args(["-KILL", "-f", "carryon-worker render", "-P", &me]).status().unwrap().success());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
