"""Any text as Markdown, LaTeX or HTML that prints it as it is."""

from __future__ import annotations

import html
import re
import unicodedata


def one_line(text: str) -> str:
    """Without line breaks and double spaces."""
    return " ".join(text.split())


def escape_markdown(text: str) -> str:
    """One line of Markdown that shows `text` as it is, also inside a table."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", one_line(text))


def escape_html(text: str) -> str:
    """One line of HTML that shows `text` as it is, in an element or in a quoted attribute."""
    visible = "".join(
        c if c == " " or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in one_line(text)
    )
    return html.escape(visible, quote=True)


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    # A row may not begin with [ or *, and " is a closing quote.
    "[": "{[}", "]": "{]}", "*": "{*}", '"': "''", "|": r"\textbar{}", "`": r"\textasciigrave{}",
    "–": r"\textendash{}", "—": r"\textemdash{}", "‘": "`", "’": "'", "“": "``", "”": "''", "…": r"\ldots{}",
    "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "÷": r"$\div$", "→": r"$\to$", "←": r"$\leftarrow$", "↔": r"$\leftrightarrow$",
    "≤": r"$\le$", "≥": r"$\ge$", "≈": r"$\approx$", "≠": r"$\ne$", "∞": r"$\infty$", "√": r"$\surd$", "∈": r"$\in$",
    "·": r"$\cdot$", "•": r"$\bullet$", "°": r"$^\circ$", "²": "$^2$", "³": "$^3$", "½": r"$\frac{1}{2}$",
    "✓": r"\checkmark{}", "✗": r"$\times$", "µ": r"$\mu$", "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}",
    "Ø": r"\O{}", "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}",
}  # fmt: skip
_GREEK = (
    r"α\alpha β\beta γ\gamma δ\delta ε\varepsilon ζ\zeta η\eta θ\theta ι\iota κ\kappa λ\lambda μ\mu ν\nu ξ\xi π\pi "
    r"ρ\rho σ\sigma τ\tau υ\upsilon φ\varphi χ\chi ψ\psi ω\omega Γ\Gamma Δ\Delta Θ\Theta Λ\Lambda Ξ\Xi Π\Pi Σ\Sigma "
    r"Φ\Phi Ψ\Psi Ω\Omega"
)
_LATEX |= {letter[0]: f"${letter[1:]}$" for letter in _GREEK.split()}
# Combining accents and the LaTeX command for each.
_ACCENTS = dict(
    zip("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327", "`'^~=u.\"rHvc", strict=True)
)


def escape_latex(text: str) -> str:
    """One line of ASCII LaTeX that prints `text` with the standard fonts; a character they lack becomes [U+XXXX].

    Check marks are the command checkmark, which `Sheet.latex` defines where the document does not.
    """
    latex = "".join(_character(character) for character in one_line(unicodedata.normalize("NFC", text)))
    return re.sub("-(?=-)", "-{}", latex)  # hyphens must not join into a dash


def _character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    if " " <= character <= "~":
        return character
    base, *marks = list(unicodedata.normalize("NFKD", character))
    if len(marks) == 1 and base.isascii() and base.isalpha() and marks[0] in _ACCENTS:
        return rf"\{_ACCENTS[marks[0]]}{{{base}}}"
    if not marks and base != character and " " <= base <= "~":  # such as full-width letters
        return _character(base)
    return f"{{[}}U+{ord(character):04X}{{]}}"
