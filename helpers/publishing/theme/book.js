// Search over the sections of all notebooks, a menu that starts closed on a phone, scrollable boxes that the keyboard reaches.
"use strict";

const query = document.getElementById("query");
const found = document.getElementById("found");
const MOST = 20;
let index = null;

// The index is a script and not JSON: so the site also works when its files are opened without a server.
function loadIndex() {
  index ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "search-index.js";
    script.onload = () => resolve(window.courseIndex);
    script.onerror = reject;
    document.head.append(script);
  });
  return index;
}

// Sections that contain every word, best first: words in the heading count more than words in the text.
function search(sections, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const hits = [];
  for (const section of sections) {
    const heading = section.heading.toLowerCase(), body = section.text.toLowerCase();
    if (!words.every((word) => heading.includes(word) || body.includes(word))) continue;
    let score = body.includes(words.join(" ")) ? 3 : 0;
    for (const word of words) score += (heading.includes(word) ? 5 : 0) + Math.min(body.split(word).length - 1, 4);
    hits.push({ section, score, at: Math.max(body.indexOf(words.join(" ")), 0) || Math.max(body.indexOf(words[0]), 0) });
  }
  return hits.sort((a, b) => b.score - a.score);
}

// Text is set as text, never as HTML: a query or a section with tags in it stays text.
function item({ section, at }, words) {
  const line = document.createElement("li"), link = document.createElement("a"), excerpt = document.createElement("p");
  link.href = section.link;
  link.textContent = section.page === section.heading ? section.page : `${section.page}: ${section.heading}`;
  const from = Math.max(at - 60, 0);
  const pattern = new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
  section.text.slice(from, from + 180).split(pattern).forEach((part, number) => {
    const piece = document.createElement(number % 2 ? "mark" : "span");
    piece.textContent = part;
    excerpt.append(piece);
  });
  line.append(link, excerpt);
  return line;
}

async function show() {
  const text = query.value.trim();
  found.hidden = text.length < 2;
  if (found.hidden) return;
  const hits = search(await loadIndex(), text);
  if (text !== query.value.trim()) return; // typed on while the index was loading
  const words = text.split(/\s+/);
  found.querySelector("p").textContent = hits.length
    ? `${hits.length} section${hits.length === 1 ? "" : "s"}${hits.length > MOST ? `, the best ${MOST}` : ""}`
    : "Nothing found.";
  found.querySelector("ol").replaceChildren(...hits.slice(0, MOST).map((hit) => item(hit, words)));
}

query.addEventListener("input", show);
query.form.addEventListener("submit", (event) => {
  event.preventDefault();
  found.querySelector("a")?.click();
});
found.addEventListener("click", (event) => {
  if (event.target.closest("a")) found.hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !found.hidden) {
    found.hidden = true;
    query.focus();
  }
});

if (matchMedia("(max-width: 52rem)").matches) document.querySelector(".contents details").open = false;

function reachable() {
  for (const box of document.querySelectorAll(".wide, pre")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
    if (box.matches("pre, .picture")) { // a name for what takes the focus; tables have theirs
      box.role = "group";
      box.ariaLabel = `${box.matches("pre") ? "Text" : "Picture"} that scrolls sideways`;
    }
  }
}
addEventListener("load", reachable);
addEventListener("resize", reachable);
