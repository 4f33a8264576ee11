"""A rule whose output is a directory."""

def _farm_impl(ctx):
    out = ctx.actions.declare_directory(ctx.label.name)
    ctx.actions.run(
        outputs = [out],
        inputs = [ctx.file.tool],
        executable = ctx.file.tool,
        arguments = [out.path],
        mnemonic = "Farm",
        use_default_shell_env = True,
    )
    return [DefaultInfo(files = depset([out]))]

farm = rule(
    implementation = _farm_impl,
    attrs = {"tool": attr.label(allow_single_file = True, mandatory = True)},
)
