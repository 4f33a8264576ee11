//! Actions in container images: from a layout directory, and from a registry in this test.

use crate::support::{
    Client, Server, empty, eventually,
    images::{Blobs, LayerArchive, gzip, shell_layer, tagged, zstd},
    metadata, sh_with, shared_dir,
};
use axum::http::StatusCode;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use gorego_reapi::proto::{
    longrunning::CancelOperationRequest,
    reapi::{Command, ExecuteResponse, Platform, command::EnvironmentVariable, platform::Property},
};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::{Arc, atomic::Ordering::Relaxed},
};
use tempfile::TempDir;
use tonic::Code;

mod registry;

use registry::{Content, TestRegistry, greedy_host};

/// The name of the file that only images have.
const MARKER: &str = "etc/marker";

/// An image whose programs are in `/image`, with a marker and a user.
fn image(blobs: &mut Blobs, marker: &str) -> String {
    let layers = vec![
        gzip(&shell_layer().file(MARKER, b"old", 0o644).file("gone", b"", 0o644).finish()),
        zstd(
            &LayerArchive::new().file(MARKER, marker.as_bytes(), 0o600).file(".wh.gone", b"", 0o644).finish(),
        ),
    ];
    let config = json!({
        "Env": ["PATH=/image", "FROM=image", "ONLY=image"],
        "User": "7:8",
        "WorkingDir": "/nowhere",
        "Entrypoint": ["/never"],
    });
    blobs.image(layers, config)
}

/// A command that finds its shell by the PATH of the image, and prints what it sees.
fn look() -> Command {
    const SCRIPT: &str = "read marker < /etc/marker; \
        while read key value rest; do case $key in Uid:) uid=$value;; Gid:) gid=$value;; esac; done < /proc/self/status; \
        host=no; [ -e /usr/bin/env ] && host=yes; gone=no; [ -e /gone ] && gone=yes; \
        write=no; (echo x > /etc/marker) 2>/dev/null && write=yes; \
        echo \"$marker $FROM $ONLY $PWD $uid:$gid host=$host gone=$gone write=$write\" > out";
    Command {
        arguments: ["sh", "-c", SCRIPT].map(str::to_owned).into(),
        environment_variables: vec![EnvironmentVariable { name: "FROM".into(), value: "command".into() }],
        output_paths: vec!["out".into()],
        ..Default::default()
    }
}

/// Runs a command in an image.
async fn run_in(client: &Client, image: &str, command: Command) -> ExecuteResponse {
    let properties = vec![Property { name: "container-image".into(), value: image.into() }];
    let action = client
        .action_with(command, empty(), |action| {
            action.platform = Some(Platform { properties });
            action.do_not_cache = true;
        })
        .await;
    client.run(action).await
}

async fn finds(client: &Client, image: &str) -> String {
    let response = run_in(client, image, look()).await;
    let result = response.result.clone().unwrap_or_else(|| panic!("{response:?}"));
    assert_eq!(result.exit_code, 0, "{}", client.stderr(&result).await);
    client.output(&result, "out").await.trim().to_owned()
}

async fn refused(client: &Client, image: &str) -> (Code, String) {
    let response = run_in(client, image, look()).await;
    let status = response.status.unwrap_or_default();
    (Code::from_i32(status.code), status.message)
}

/// A server with the sandbox; `None` if this machine does not support it.
async fn server(overrides: &[(&str, &str)]) -> Option<Server> {
    server_on(Arc::new(tempfile::tempdir().unwrap()), overrides).await
}

async fn server_on(store: Arc<TempDir>, overrides: &[(&str, &str)]) -> Option<Server> {
    let server = Server::on(store, overrides).await;
    let has_namespaces = server.started()["sandbox"].as_str()?.contains("namespaces");
    if !has_namespaces {
        eprintln!("skipped: images take the namespaces of the sandbox, which are off here");
    }
    has_namespaces.then_some(server)
}

const FOUND: &str = "command image /build 7:8 host=no gone=no write=no";

#[tokio::test]
async fn an_action_finds_the_files_and_variables_of_the_image_that_it_names_and_nothing_of_the_host() {
    let site = tempfile::tempdir().unwrap();
    fs::set_permissions(site.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut blobs = Blobs::default();
    let digest = image(&mut blobs, "first");
    let layout = site.path().join("tools");
    blobs.write_layout(&layout, &[blobs.entry(&digest, tagged("v1"))]);
    let layouts = format!("[\"{}\"]", site.path().display());
    let settings = [("EXECUTION__IMAGES__LAYOUTS", &*layouts), ("EXECUTION__CONCURRENCY", "2")];
    let Some(server) = server(&settings).await else { return };
    let client = server.client().await;
    let name = format!("oci:{}", layout.display());
    assert_eq!(finds(&client, &name).await, format!("first {FOUND}"));
    // Actions with an image and without one take turns in the same slots.
    let plain = client
        .run(client.action(sh_with("test -e /usr/bin/env && echo host > out", &["out"]), empty()).await)
        .await;
    assert_eq!(client.output(&plain.result.unwrap(), "out").await, "host\n");
    // Another image under the same name is another image.
    let second = image(&mut blobs, "second");
    blobs.write_layout(&layout, &[blobs.entry(&second, tagged("v1"))]);
    assert_eq!(finds(&client, &format!("{name}:v1")).await, format!("second {FOUND}"));
    assert_eq!(finds(&client, &format!("{name}@{digest}")).await, format!("first {FOUND}"));

    for (wrong, code, part) in [
        ("ubuntu", Code::InvalidArgument, "docker://"),
        ("oci:/etc", Code::FailedPrecondition, "execution.images.layouts"),
        (&*format!("{name}:v2"), Code::FailedPrecondition, "no image \"v2\"; the images in it are: v1"),
        ("docker://registry.example.com/a@sha256:", Code::InvalidArgument, "is not a digest"),
    ] {
        let (found, message) = refused(&client, wrong).await;
        assert!(found == code && message.contains(part), "{wrong}: {found:?} {message}");
    }

    // The image outlives the server and its source.
    let store = server.kill().await;
    fs::remove_dir_all(layout.join("blobs")).unwrap();
    let server = server_on(store, &settings).await.unwrap();
    assert_eq!(finds(&server.client().await, &name).await, format!("second {FOUND}"));
}

#[tokio::test]
async fn without_images_in_the_configuration_the_property_has_no_effect() {
    let server = Server::start().await;
    let client = server.client().await;
    let response =
        run_in(&client, "docker://registry.example.com/a:b", sh_with("echo > out", &["out"])).await;
    assert_eq!(response.result.unwrap().exit_code, 0);
}

fn allowed(registry: &TestRegistry) -> String {
    format!("[\"http://{}\"]", registry.address())
}

#[tokio::test]
async fn an_image_is_pulled_once_for_all_actions_that_want_it_with_the_credentials_for_its_registry() {
    let mut content = Content { login: Some("me:secret".into()), ..Content::default() };
    let digest = image(&mut content.blobs, "pulled");
    let registry = TestRegistry::serve(content).await;
    let site = tempfile::tempdir().unwrap();
    let credentials = site.path().join("config.json");
    let auths = json!({ "auths": { registry.address(): { "auth": BASE64.encode("me:secret") } } });
    fs::write(&credentials, auths.to_string()).unwrap();
    let registries = allowed(&registry);
    let Some(server) = server(&[
        ("EXECUTION__IMAGES__REGISTRIES", &registries),
        ("EXECUTION__IMAGES__CREDENTIALS", credentials.to_str().unwrap()),
        ("EXECUTION__CONCURRENCY", "3"),
    ])
    .await
    else {
        return;
    };
    let client = server.client().await;
    let name = format!("docker://{}/team/tools:ignored@{digest}", registry.address());
    let (first, second, third) =
        tokio::join!(finds(&client, &name), finds(&client, &name), finds(&client, &name));
    assert!([first, second, third].iter().all(|found| *found == format!("pulled {FOUND}")));
    let layers: Vec<_> =
        registry.0.lock().unwrap().blobs.0.keys().filter(|blob| **blob != digest).cloned().collect();
    for blob in layers {
        assert_eq!(registry.served(&format!("/elsewhere/{blob}")), 1, "{blob}");
    }
    // An unpacked image needs no answer of its registry, but the registry must still be allowed.
    registry.change(|content| content.broken = Some(StatusCode::INTERNAL_SERVER_ERROR));
    assert_eq!(finds(&client, &name).await, format!("pulled {FOUND}"));
    server.logged("image_pulled").await;
    let pulled: Vec<_> = server.log().into_iter().filter(|event| event["event"] == "image_pulled").collect();
    assert!(pulled.len() == 1 && pulled[0]["digest"] == *digest, "{pulled:?}");
    let log = serde_json::to_string(&server.log()).unwrap();
    assert!(!log.contains("t0ken") && !log.contains("secret"), "credentials stay out of the log");
}

#[tokio::test]
async fn the_credentials_of_a_registry_never_reach_a_host_that_it_redirects_to() {
    let (greedy, got) = greedy_host().await;
    let mut content = Content { login: Some("me:secret".into()), redirects_to: greedy, ..Content::default() };
    let digest = image(&mut content.blobs, "pulled");
    let registry = TestRegistry::serve(content).await;
    let site = tempfile::tempdir().unwrap();
    let credentials = site.path().join("config.json");
    let auths = json!({ "auths": { registry.address(): { "auth": BASE64.encode("me:secret") } } });
    fs::write(&credentials, auths.to_string()).unwrap();
    let Some(server) = server(&[
        ("EXECUTION__IMAGES__REGISTRIES", &allowed(&registry)),
        ("EXECUTION__IMAGES__CREDENTIALS", credentials.to_str().unwrap()),
    ])
    .await
    else {
        return;
    };
    let client = server.client().await;
    let name = format!("docker://{}/team/tools@{digest}", registry.address());
    let (code, message) = refused(&client, &name).await;
    assert_eq!(code, Code::FailedPrecondition, "{message}");
    assert_eq!(got.load(Relaxed), 0);
}

#[tokio::test]
async fn an_image_that_cannot_be_had_is_an_error_of_its_kind_and_is_not_asked_for_again_and_again() {
    let mut content = Content::default();
    let good = image(&mut content.blobs, "good");
    let bad = image(&mut content.blobs, "bad");
    let layer =
        serde_json::from_slice::<serde_json::Value>(&content.blobs.0[&bad]).unwrap()["layers"][1]["digest"]
            .as_str()
            .unwrap()
            .to_owned();
    content.blobs.0.get_mut(&layer).unwrap()[0] ^= 1;
    let registry = TestRegistry::serve(content).await;
    let registries = format!("[\"http://{}\", \"http://127.0.0.1:9\"]", registry.address());
    let settings = [("EXECUTION__IMAGES__REGISTRIES", &*registries), ("EXECUTION__IMAGES__TIMEOUT", "3s")];
    let Some(server) = server(&settings).await else { return };
    let client = server.client().await;
    let at = |rest: &str| format!("docker://{}/team/{rest}", registry.address());
    let absent = "sha256:".to_owned() + &"0".repeat(64);
    for (name, code, part) in [
        (at("tools:v1"), Code::FailedPrecondition, "execution.images.tags"),
        (at(&format!("tools@{absent}")), Code::FailedPrecondition, "it has no team/tools/manifests"),
        (at(&format!("other@{good}")), Code::FailedPrecondition, "it has no team/other/manifests"),
        (at(&format!("tools@{bad}")), Code::FailedPrecondition, "another digest"),
        (
            format!("docker://localhost/team/tools@{good}"),
            Code::FailedPrecondition,
            "execution.images.registries",
        ),
        (format!("docker://127.0.0.1:9/team/tools@{good}"), Code::Unavailable, "cannot be reached"),
    ] {
        let (found, message) = refused(&client, &name).await;
        assert!(
            found == code && message.contains(part) && message.contains("image"),
            "{name}: {found:?} {message}"
        );
    }
    let asked = registry.0.lock().unwrap().asked.len();
    let (code, _) = refused(&client, &at(&format!("tools@{bad}"))).await;
    assert_eq!(code, Code::FailedPrecondition);
    assert_eq!(registry.0.lock().unwrap().asked.len(), asked, "the failure is remembered for a moment");
    registry.change(|content| content.login = Some("me:secret".into()));
    let (code, message) = refused(&client, &at(&format!("tools@{good}"))).await;
    assert!(
        code == Code::FailedPrecondition && message.contains("execution.images.credentials"),
        "{message}"
    );
    registry.change(|content| content.is_silent = true);
    let other = "sha256:".to_owned() + &"1".repeat(64);
    let (code, message) = refused(&client, &at(&format!("tools@{other}"))).await;
    assert!(code == Code::Unavailable && message.contains("execution.images.timeout"), "{message}");
    let left = fs::read_dir(server.store().join("build/images")).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert!(
        left.iter().all(|name| name.starts_with("layer-") && !name.contains(&layer["sha256:".len()..])),
        "nothing of a failed pull is left but whole layers: {left:?}"
    );
}

#[tokio::test]
async fn a_tag_means_what_the_configuration_says_and_images_that_pools_name_are_ready_at_the_start() {
    let mut content = Content::default();
    let (first, second) = (image(&mut content.blobs, "first"), image(&mut content.blobs, "second"));
    content.tags.insert("v1".into(), first.clone());
    let registry = TestRegistry::serve(content).await;
    let (registries, name) = (allowed(&registry), format!("docker://{}/team/tools:v1", registry.address()));
    for (policy, expected) in [("each_action", "second"), ("once", "first")] {
        registry.change(|content| _ = content.tags.insert("v1".into(), first.clone()));
        let pools = format!("{{ p = {{ slots = 1, properties = {{ container-image = \"{name}\" }} }} }}");
        let settings = [
            ("EXECUTION__IMAGES__REGISTRIES", &*registries),
            ("EXECUTION__IMAGES__TAGS", policy),
            ("EXECUTION__POOLS", &*pools),
        ];
        let Some(server) = server(&settings).await else { return };
        let is_ready = || server.log().iter().any(|event| event["event"] == "image_pulled");
        eventually("the image that the pool names is pulled", is_ready).await;
        let client = server.client().await;
        assert_eq!(finds(&client, &name).await, format!("first {FOUND}"), "{policy}");
        registry.change(|content| _ = content.tags.insert("v1".into(), second.clone()));
        assert_eq!(finds(&client, &name).await, format!("{expected} {FOUND}"), "{policy}");
    }
}

#[tokio::test]
async fn an_action_waits_for_its_image_in_the_queue_and_leaves_its_slot_to_others() {
    let mut content = Content { is_silent: true, ..Content::default() };
    let digest = image(&mut content.blobs, "pulled");
    let registry = TestRegistry::serve(content).await;
    let registries = allowed(&registry);
    let settings = [
        ("EXECUTION__IMAGES__REGISTRIES", &*registries),
        ("EXECUTION__IMAGES__TAGS", "each_action"),
        ("EXECUTION__CONCURRENCY", "1"),
    ];
    let Some(server) = server(&settings).await else { return };
    let client = server.client().await;
    let start = async |image: String| {
        let properties = vec![Property { name: "container-image".into(), value: image }];
        let action = client.action_with(look(), empty(), |action| {
            action.platform = Some(Platform { properties });
            action.do_not_cache = true;
        });
        let mut run = client.start(action.await).await;
        let queued = run.until(|operation| metadata(operation).stage == 2).await;
        (run, queued.name)
    };
    let at = |rest: &str| format!("docker://{}/team/tools{rest}", registry.address());
    // An action waits in the queue for the digest of a tag and for the image itself.
    let waiting = [start(at(":v1")).await, start(at(&format!("@{digest}"))).await];
    eventually("the registry was asked", || registry.0.lock().unwrap().requests == 2).await;
    let plain = client.run(client.action(sh_with("echo done > out", &["out"]), empty()).await).await;
    assert_eq!(client.output(&plain.result.unwrap(), "out").await, "done\n");
    let mut operations = client.operations.clone();
    for (run, name) in waiting {
        operations.cancel_operation(CancelOperationRequest { name }).await.unwrap();
        let response = run.finish().await;
        assert_eq!(Code::from_i32(response.status.unwrap().code), Code::Cancelled);
    }
}

#[tokio::test]
async fn a_tag_that_many_actions_name_is_looked_up_once_and_so_is_one_that_is_not_there() {
    let mut content = Content::default();
    let digest = image(&mut content.blobs, "pulled");
    content.tags.insert("v1".into(), digest);
    let registry = TestRegistry::serve(content).await;
    let registries = allowed(&registry);
    let settings = [
        ("EXECUTION__IMAGES__REGISTRIES", &*registries),
        ("EXECUTION__IMAGES__TAGS", "each_action"),
        ("EXECUTION__CONCURRENCY", "4"),
    ];
    let Some(server) = server(&settings).await else { return };
    let client = server.client().await;
    let absent = format!("docker://{}/team/tools:v2", registry.address());
    let all = futures::future::join_all((0..8).map(|_| refused(&client, &absent))).await;
    for (code, message) in all {
        assert!(code == Code::FailedPrecondition && message.contains("it has no"), "{message}");
    }
    let asked = |end: &str| {
        let content = registry.0.lock().unwrap();
        content.asked.iter().filter(|(path, _)| path.ends_with(end)).count()
    };
    assert_eq!(asked("/manifests/v2"), 1, "the failure is the answer to all for a moment");
    let name = format!("docker://{}/team/tools:v1", registry.address());
    assert_eq!(finds(&client, &name).await, format!("pulled {FOUND}"));
    let before = asked("/manifests/v1");
    assert_eq!(finds(&client, &name).await, format!("pulled {FOUND}"));
    assert!(asked("/manifests/v1") > before, "each action asks again");
}

#[tokio::test]
async fn a_registry_cannot_lead_this_server_to_addresses_that_are_farther_inside_than_its_own() {
    let registries = TestRegistry::serve(Content::default()).await;
    let listed = allowed(&registries);
    let Some(server) = server(&[("EXECUTION__IMAGES__REGISTRIES", &listed)]).await else { return };
    let client = server.client().await;
    for (number, target) in
        ["http://169.254.169.254", "http://10.1.2.3:8080", "http://[fe80::1]"].iter().enumerate()
    {
        let mut blobs = Blobs::default();
        let digest = image(&mut blobs, &format!("image {number}"));
        registries.change(|content| {
            content.blobs = blobs;
            content.redirects_to = (*target).to_owned();
        });
        let name = format!("docker://{}/team/tools@{digest}", registries.address());
        let (code, message) = refused(&client, &name).await;
        assert!(
            code == Code::FailedPrecondition
                && message.contains("neither public nor in a network like the registry"),
            "{target}: {code:?} {message}"
        );
    }
}

/// EXE-62: an image for which the disk has no room does not harm other actions.
#[tokio::test]
async fn an_image_that_would_fill_the_disk_is_given_up_before_it_stops_other_actions() {
    let site = shared_dir();
    let mut blobs = Blobs::default();
    let mut layer = shell_layer();
    for number in 0..24 {
        layer = layer.file(&format!("large-{number}"), &vec![0; 4 << 20], 0o644);
    }
    let digest = blobs.image(vec![gzip(&layer.finish())], json!({}));
    let layout = site.path().join("large");
    blobs.write_layout(&layout, &[blobs.entry(&digest, json!({}))]);
    let layouts = format!("[\"{}\"]", site.path().display());
    let settings = [("EXECUTION__IMAGES__LAYOUTS", &*layouts), ("EXECUTION__CONCURRENCY", "2")];
    let server = Server::on_a_disk_with("size=64m", &settings).await;
    if !server.started()["sandbox"].as_str().is_some_and(|on| on.contains("namespaces")) {
        eprintln!("skipped: images take the namespaces of the sandbox, which are off here");
        return;
    }
    let client = server.client().await;
    let go_on = site.path().join("go-on");
    let script = format!("until [ -e {} ]; do sleep 0.05; done; echo done > out", go_on.display());
    let other = client.action(sh_with(&script, &["out"]), empty()).await;
    let mut run = client.start(other).await;
    run.until(|operation| metadata(operation).stage == 3).await;
    let (code, message) = refused(&client, &format!("oci:{}", layout.display())).await;
    assert!(code == Code::Unavailable && message.contains("disk"), "{code:?} {message}");
    fs::write(go_on, "").unwrap();
    let response = run.finish().await;
    assert_eq!(client.output(&response.result.unwrap(), "out").await, "done\n");
    let hash = other.hash_hex();
    let was_stopped = server.log().iter().any(|event| {
        event["event"] == "operation_requeued"
            && event["action_digest"].as_str().is_some_and(|of| of.contains(&hash))
    });
    assert!(!was_stopped, "the action that ran beside it was not disturbed");
    assert_eq!(fs::read_dir(server.inside("build/images")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_layer_that_several_images_have_is_downloaded_once_and_again_if_what_was_kept_is_damaged() {
    let mut content = Content::default();
    let common = gzip(&shell_layer().finish());
    let mut image = |name: &str| {
        let own = LayerArchive::new().file(MARKER, name.as_bytes(), 0o644);
        let config = json!({ "Env": ["PATH=/image", "ONLY=image"], "User": "7:8" });
        content.blobs.image(vec![common.clone(), gzip(&own.finish())], config)
    };
    let images: Vec<_> = ["first", "second", "third", "fourth"].map(|name| (name, image(name))).into();
    let common = format!("/elsewhere/{}", crate::support::images::digest(&common));
    let registry = TestRegistry::serve(content).await;
    let registries = allowed(&registry);
    let settings = [("EXECUTION__IMAGES__REGISTRIES", &*registries), ("EXECUTION__MAX_ATTEMPTS", "1")];
    let Some(server) = server(&settings).await else { return };
    let client = server.client().await;
    let at = |number: usize| format!("docker://{}/team/tools@{}", registry.address(), images[number].1);
    // Images that are pulled at the same time share one download too.
    let (first, second) = (at(0), at(1));
    let (first, second) = tokio::join!(finds(&client, &first), finds(&client, &second));
    assert_eq!([first, second], [format!("first {FOUND}"), format!("second {FOUND}")]);
    assert_eq!(registry.served(&common), 1);
    // The layers outlive the server.
    let store = server.kill().await;
    let server = server_on(store, &settings).await.unwrap();
    let client = server.client().await;
    let layers = || {
        let entries = fs::read_dir(server.store().join("build/images")).unwrap().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    assert_eq!(layers().len(), 3, "the common one, and one of each");
    for layer in layers() {
        let mut bytes = fs::read(&layer).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&layer, bytes).unwrap();
    }
    let (code, message) = refused(&client, &at(2)).await;
    assert!(code == Code::Unavailable && message.contains("damaged"), "{code:?} {message}");
    assert_eq!(finds(&client, &at(3)).await, format!("fourth {FOUND}"));
    assert_eq!(registry.served(&common), 2, "it was fetched again");
}
