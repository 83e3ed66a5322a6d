"use strict";
// Three habits: parts of a page that keep themselves up to date, forms that answer while one types, files that are sent when
// they are chosen. Without it everything works by the buttons.

const PAUSE = 800; // ms between two looks at what runs
const TYPING = 250; // ms without a key before a form answers

const say = (text) => { document.getElementById("say").textContent = text; };
const lost = (yes) => { document.getElementById("lost").hidden = !yes; };
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function text(address) {
  const answer = await fetch(address, { cache: "no-store" });
  if (!answer.ok) throw new Error(answer.status);
  return answer.text();
}

// Put another version of a part in its place; what was open or had the focus has it again.
function exchange(part, html) {
  const holder = document.createElement("template");
  holder.innerHTML = html;
  const fresh = holder.content.firstElementChild;
  const focused = part.contains(document.activeElement) ? document.activeElement.id : "";
  for (const open of part.querySelectorAll("details[open][id]")) {
    const same = fresh.querySelector("#" + CSS.escape(open.id));
    if (same) same.open = true;
  }
  part.replaceWith(fresh);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  return fresh;
}

async function keepUpToDate(part) {
  let last = "";
  while (part.dataset.live) {
    await pause(Number(part.dataset.pause || PAUSE));
    if (document.hidden) continue;
    let html;
    try {
      html = await text(part.dataset.live);
      lost(false);
    } catch {
      lost(true);
      continue;
    }
    if (html === last) continue;
    last = html;
    const state = part.dataset.state;
    part = exchange(part, html);
    if (part.dataset.state !== state && part.dataset.say) say(part.dataset.say);
    if (!part.dataset.live && part.dataset.reload) location.reload();
  }
}

for (const part of document.querySelectorAll("[data-live]")) keepUpToDate(part);

for (const form of document.querySelectorAll("form[data-reading]")) {
  let timer = 0;
  let asked = 0;
  form.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const mine = ++asked;
      const typed = new URLSearchParams(new FormData(form));
      try {
        const html = await text(form.dataset.reading + "?" + typed);
        if (mine === asked) exchange(document.getElementById(form.dataset.into), html);
      } catch {
        // what is typed is read again when the form is sent
      }
    }, TYPING);
  });
}

for (const input of document.querySelectorAll("input[type=file][data-send]")) {
  input.addEventListener("change", () => { if (input.files.length) input.form.requestSubmit(); });
}

document.addEventListener("submit", (event) => {
  const button = event.submitter || event.target.querySelector("button");
  if (button) setTimeout(() => { button.disabled = true; button.setAttribute("aria-busy", "true"); }, 0);
});
addEventListener("pageshow", () => {
  for (const button of document.querySelectorAll("[aria-busy]")) {
    button.disabled = false;
    button.removeAttribute("aria-busy");
  }
});
