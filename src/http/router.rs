//! [`Router`]: which mount serves a path. Pure. Paths are hostile until they are matched here.
//!
//! A mount is added with the [`Route`]s that it serves. The first route that covers a path decides, for all methods.

use crate::access::permission::Permissions;

/// Methods with the permissions that they need.
pub type Methods = &'static [(&'static str, Permissions)];

/// The methods of a resource that may be read without a credential.
pub const OPEN: Methods = &[("GET", &[]), ("HEAD", &[])];

/// Paths of one kind, and the methods that they support.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The paths that the route covers.
    pub at: RoutePlace,
    /// The supported methods, each with the permissions that it needs.
    pub methods: Methods,
    /// The paths and their meaning, for [`Router::index`]. A route without a text is not listed.
    pub shown: &'static str,
}

impl Route {
    /// The supported methods, as the Allow header has them.
    pub fn allow(&self) -> String {
        self.methods.iter().map(|(method, _)| *method).collect::<Vec<_>>().join(", ")
    }
}

/// The paths of a route. No path here begins with a slash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoutePlace {
    /// This path and no other.
    Path(&'static str),
    /// `[INSTANCE/]KEYWORD[/REST]`, for any instance name and any rest.
    Below(&'static str),
    /// The same, if the rest is empty or ends with a slash.
    Collections(&'static str),
}

impl RoutePlace {
    fn keyword(self) -> Option<&'static str> {
        match self {
            Self::Path(_) => None,
            Self::Below(keyword) | Self::Collections(keyword) => Some(keyword),
        }
    }

    fn covers(self, path: &str, parts: Parts<'_>) -> bool {
        let (_, found, rest) = parts;
        match self {
            Self::Path(own) => own == path,
            Self::Below(keyword) => found == keyword,
            Self::Collections(keyword) => found == keyword && (rest.is_empty() || rest.ends_with('/')),
        }
    }
}

/// The place that a path names. The texts are empty for [`RoutePlace::Path`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoutedPath<'a> {
    /// The route of the path.
    pub route: &'static Route,
    /// The permissions that the method needs there.
    pub permissions: Permissions,
    /// The instance name; not looked up.
    pub instance_name: &'a str,
    /// The segment by which the path was recognised.
    pub keyword: &'a str,
    /// Everything after the keyword and a slash, undecoded.
    pub rest: &'a str,
}

/// The reason why a request has no route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed {
    /// No route covers the path.
    Path,
    /// The route of the path does not support the method.
    Method(&'static Route),
}

/// The instance name, the keyword and the rest of a path; all empty if there is no keyword.
type Parts<'a> = (&'a str, &'a str, &'a str);

/// The mounts of a port by their routes.
#[derive(Debug)]
pub struct Router<M> {
    mounts: Vec<(&'static [Route], M)>,
}

impl<M> Default for Router<M> {
    fn default() -> Self {
        Self { mounts: Vec::new() }
    }
}

impl<M> Router<M> {
    /// Adds a mount after the existing ones.
    pub fn mount(&mut self, routes: &'static [Route], mount: M) {
        self.mounts.push((routes, mount));
    }

    /// Finds the mount that serves a request.
    ///
    /// # Errors
    /// [`Missed`] says whether the path or the method is wrong.
    pub fn find<'a>(&'a self, method: &str, path: &'a str) -> Result<(&'a M, RoutedPath<'a>), Missed> {
        let path = path.trim_start_matches('/');
        let parts = self.take_apart(path);
        let mut routes = self.routes();
        let (mount, route) = routes.find(|(_, route)| route.at.covers(path, parts)).ok_or(Missed::Path)?;
        let method = route.methods.iter().find(|(name, _)| *name == method);
        let (_, permissions) = method.ok_or(Missed::Method(route))?;
        let (instance_name, keyword, rest) = parts;
        Ok((mount, RoutedPath { route, permissions, instance_name, keyword, rest }))
    }

    /// The paths that are served, for people.
    pub fn index(&self) -> String {
        let shown = self.routes().map(|(_, route)| route.shown).filter(|shown| !shown.is_empty());
        shown.collect::<Vec<_>>().join(", ")
    }

    fn routes(&self) -> impl Iterator<Item = (&M, &'static Route)> {
        self.mounts.iter().flat_map(|(routes, mount)| routes.iter().map(move |route| (mount, route)))
    }

    /// Splits a path at its first keyword. So an instance whose name contains a keyword as a segment cannot be
    /// addressed.
    fn take_apart<'a>(&self, path: &'a str) -> Parts<'a> {
        let mut start = 0;
        for segment in path.split('/') {
            let end = start + segment.len();
            if self.routes().any(|(_, route)| route.at.keyword() == Some(segment)) {
                let instance_name = path.get(..start.saturating_sub(1)).unwrap_or_default();
                return (instance_name, segment, path.get(end + 1..).unwrap_or_default());
            }
            start = end + 1;
        }
        Parts::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::permission::Permission::{AcRead, AcWrite};

    const STORE: &[Route] = &[
        Route { at: RoutePlace::Collections("key"), methods: &[("LIST", &[])], shown: "" },
        Route {
            at: RoutePlace::Below("key"),
            methods: &[("GET", &[AcRead]), ("PUT", &[AcWrite])],
            shown: "[/INSTANCE]/key/NAME (values)",
        },
        Route { at: RoutePlace::Below("blob"), methods: OPEN, shown: "[/INSTANCE]/blob/HASH (blobs)" },
    ];
    const NUMBERS: &[Route] = &[Route { at: RoutePlace::Path("numbers"), methods: OPEN, shown: "/numbers" }];

    fn router() -> Router<&'static str> {
        let mut router = Router::default();
        router.mount(STORE, "store");
        router.mount(NUMBERS, "numbers");
        router
    }

    #[test]
    fn a_path_is_taken_apart_at_its_first_keyword() {
        for (path, instance_name, keyword, rest) in [
            ("/key/a", "", "key", "a"),
            ("//key/a", "", "key", "a"),
            ("/key/blob/a", "", "key", "blob/a"),
            ("/main/blob/a/key", "main", "blob", "a/key"),
            ("/a//b/blob", "a//b", "blob", ""),
        ] {
            let router = router();
            let (mount, place) = router.find("GET", path).unwrap();
            assert_eq!(*mount, "store", "{path}");
            assert_eq!(place, RoutedPath { instance_name, keyword, rest, ..place });
        }
    }

    #[test]
    fn the_first_route_that_covers_a_path_decides_about_its_methods() {
        let router = router();
        for path in ["/key", "/key/", "/main/key/a/", "/key//"] {
            assert_eq!(router.find("LIST", path).unwrap().1.route, &STORE[0], "{path}");
            assert_eq!(router.find("GET", path), Err(Missed::Method(&STORE[0])), "{path}");
        }
        assert_eq!(router.find("LIST", "/key/a"), Err(Missed::Method(&STORE[1])));
        assert_eq!(router.find("get", "/blob/a"), Err(Missed::Method(&STORE[2])));
        assert_eq!(STORE[1].allow(), "GET, PUT");
        assert_eq!(router.find("PUT", "/key/a").unwrap().1.permissions, [AcWrite]);
    }

    #[test]
    fn a_path_of_its_own_has_nothing_in_front_or_behind() {
        let router = router();
        assert_eq!(*router.find("GET", "/numbers").unwrap().0, "numbers");
        for path in ["", "/", "/numbers/", "/main/numbers", "/Numbers", "/keys/a", "*"] {
            assert_eq!(router.find("GET", path), Err(Missed::Path), "{path}");
        }
        assert_eq!(router.index(), "[/INSTANCE]/key/NAME (values), [/INSTANCE]/blob/HASH (blobs), /numbers");
    }
}
