//! Charts of reports, drawn as SVG.
