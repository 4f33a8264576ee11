//! Container images: actions cannot change their content, and links in them do not lead out of the sandbox.

use crate::{
    roots::everything_below,
    support::{
        empty,
        images::{Blobs, LayerArchive, shell_layer, tagged},
        sh,
    },
    with_each,
};
use gorego_reapi::proto::reapi::{Platform, platform::Property};
use serde_json::Value;
use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

/// Writes an image with a shell at /bin/sh, and with malicious links and modes.
fn hostile_layout(directory: &Path) {
    let mut blobs = Blobs::default();
    let up = "../".repeat(25);
    let hostile = LayerArchive::new()
        .symlink("bin/sh", "/image/sh")
        .symlink("leak", &format!("{up}etc/hostname"))
        .symlink("process", "/proc/1/root/etc/shadow")
        .symlink("etc/passwd", "/etc/shadow")
        .symlink("tmp", "/etc")
        .file("etc/file", b"untouched\n", 0o666)
        .file("build", b"a file where the input root is", 0o644)
        .file("image/raised", b"#!/image/sh\necho $UID\n", 0o6755)
        .directory("open", 0o777);
    let image = blobs.image(vec![shell_layer().finish(), hostile.finish()], Value::Null);
    blobs.write_layout(directory, &[blobs.entry(&image, tagged("v1"))]);
}

#[tokio::test]
async fn an_image_is_never_changed_and_its_links_do_not_lead_out() {
    let site = tempfile::tempdir().unwrap();
    fs::set_permissions(site.path(), fs::Permissions::from_mode(0o755)).unwrap();
    hostile_layout(&site.path().join("image"));
    let layouts = format!("[\"{}\"]", site.path().display());
    with_each(&[("EXECUTION__IMAGES__LAYOUTS", &layouts)], async |host| {
        let run = async |script: &str| {
            let value = format!("oci:{}", site.path().join("image").display());
            let properties = vec![Property { name: "container-image".into(), value }];
            let change = |action: &mut gorego_reapi::proto::reapi::Action| {
                action.platform = Some(Platform { properties })
            };
            let action = host.client.action_with(sh(script), empty(), change).await;
            let response = host.client.run(action).await;
            host.did(&response.result.unwrap_or_else(|| panic!("{:?}", response.status))).await
        };
        let says = async |script: &str| {
            let did = run(script).await;
            assert_eq!(did.exit_code, 0, "{script}: {}{}", did.stdout, did.stderr);
            did.stdout
        };
        assert_eq!(says("read line < /etc/file; echo $line; pwd").await, "untouched\n/build\n");
        let images = fs::read_dir(host.server.store().join("build/images")).unwrap();
        let roots: Vec<_> = images.map(|image| image.unwrap().path().join("root")).collect();
        let [root] = &*roots else { panic!("{roots:?}") };
        let before = everything_below(root);
        assert!(before.len() > 5, "{before:?}");
        for change in
            ["echo x > /etc/file", "echo x > /open/new", "echo x >> /image/sh", "echo x > /image/raised"]
        {
            let did = run(change).await;
            assert!(did.exit_code != 0 && did.stderr.contains("ead-only"), "{change}: {}", did.stderr);
        }
        for stolen in ["/process", "/etc/shadow"] {
            assert_ne!(run(&format!("read line < {stolen}")).await.exit_code, 0, "{stolen}");
        }
        // The host names come from the sandbox.
        assert_eq!(
            says("read line < /leak; echo $line; read line < /etc/hostname; echo $line").await,
            "build\nbuild\n"
        );
        assert_eq!(says("echo x > /tmp/x; echo x > here; read line < here; echo $line").await, "x\n");
        assert_eq!(
            says(
                "while read key value rest; do [ $key = Uid: ] && echo $value; done < /proc/self/status; true"
            )
            .await,
            "1000\n"
        );
        assert_eq!(everything_below(root), before);
    })
    .await;
}
