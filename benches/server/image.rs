//! A no-op in a container image that is unpacked already, beside the same no-op without an image.

#[path = "../../tests/support/images.rs"]
mod made;

use crate::{
    machine::percentiles,
    report::Report,
    target::{Client, Target},
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::reapi::{Platform, platform::Property},
};
use made::{Blobs, gzip, shell_layer};
use serde_json::json;
use std::time::{Duration, Instant};

/// Actions of each kind, which run in turns.
const ACTIONS: usize = 300;
/// What an image may add to the time of an action.
const GOAL: Duration = Duration::from_micros(500);

/// Both run the shell of the image, or of this machine, with a script that does nothing.
pub(crate) fn unpacked(report: &mut Report) {
    let site = tempfile::tempdir().expect("a directory");
    let layout = site.path().join("image");
    let mut blobs = Blobs::default();
    let image = blobs.image(vec![gzip(&shell_layer().finish())], json!({}));
    let entry = blobs.entry(&image, json!({}));
    blobs.write_layout(&layout, &[entry]);

    let layouts = json!([site.path()]).to_string();
    let store = tempfile::tempdir().expect("a directory");
    let target = Target::start_on(store, &[("GOREGO_EXECUTION__IMAGES__LAYOUTS", &layouts)]);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (with, without) = runtime.block_on(async {
        let client = Client::connect(&target.endpoint).await;
        let property =
            Property { name: "container-image".into(), value: format!("oci:{}", layout.display()) };
        let image = Some(Platform { properties: vec![property] });
        let kinds = [(image, "/image/sh"), (None, "/bin/sh")];
        let mut samples = [Vec::new(), Vec::new()];
        for at in 0..=ACTIONS {
            for ((platform, shell), samples) in kinds.iter().zip(&mut samples) {
                let root = Digest::empty(DigestFunction::Sha256);
                let arguments = [*shell, "-c", ":"];
                let salt = format!("{shell} {at}");
                let action = client.upload_action_on(platform.clone(), root, &arguments, &[], &salt).await;
                let start = Instant::now();
                client.run_well(action).await;
                // The first one unpacks the image.
                if at > 0 {
                    samples.push(start.elapsed());
                }
            }
        }
        let [with, without] = samples.map(|samples| percentiles(samples).0);
        (with, without)
    });
    report.add(
        "no-op in a container image that is unpacked, one at a time, p50",
        format!("{:.2} ms", with.as_secs_f64() * 1e3),
        format!("without an image {:.2} ms", without.as_secs_f64() * 1e3),
        "without + 0.5 ms",
        with <= without + GOAL,
    );
}
