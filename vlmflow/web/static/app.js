"use strict";
// What pages do beyond links and forms. Nothing here makes HTML of text: words from outside are set as text.
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const csrf = one("meta[name=csrf]").content;
  const told = one("#told");
  const trouble = one("#trouble");
  const tell = (text) => { trouble.textContent = ""; told.textContent = text; };
  const complain = (text) => { told.textContent = ""; trouble.textContent = text; };

  const send = async (path, body, type = "application/json") => {
    const headers = { "X-Vlmflow-Csrf": csrf, "Content-Type": type };
    let answer;
    try {
      answer = await fetch(path, { method: "POST", headers, body, credentials: "same-origin" });
    } catch {
      return { ok: false, error: "The app does not answer. Is `vlmflow serve` still running?" };
    }
    let data = {};
    try { data = await answer.json(); } catch { data.error = "The app refused: reload the page."; }
    return { ok: answer.ok, status: answer.status, ...data };
  };

  // What is to be said on the page that comes next.
  const later = (text) => sessionStorage.setItem("told", text);
  const said = sessionStorage.getItem("told");
  if (said !== null) {
    sessionStorage.removeItem("told");
    setTimeout(() => tell(said), 50); // a live region is read when it changes, not when it is there already
  }

  if (matchMedia("(max-width: 48rem)").matches) one(".facets details")?.removeAttribute("open");

  // A flagged picture is shown clear while its button is pressed.
  const reveal = (button) => {
    const image = one("img", button);
    if (button.dataset.blurred === undefined) button.dataset.blurred = image.src;
    const show = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(show));
    image.src = show ? button.dataset.clear : button.dataset.blurred;
  };

  const drawMap = async (button) => {
    const figure = one("#map");
    const image = one("img", figure);
    const shown = one(".pic.large .reveal[aria-pressed=true]") !== null || one(".pic.large .reveal") === null;
    const path = button.dataset.map + (shown ? "&show=1" : "");
    button.disabled = true;
    tell("Drawing the map; the first takes some seconds.");
    const answer = await fetch(path, { credentials: "same-origin" }).catch(() => null);
    button.disabled = false;
    if (answer === null || !answer.ok) {
      const data = answer === null ? {} : await answer.json().catch(() => ({}));
      complain(data.error || "There is no map.");
      return;
    }
    image.src = path;
    const name = button.getAttribute("aria-label").replace("show the map", "Map");
    image.alt = `${name}: regions that raise its score are red`;
    one("figcaption", figure).textContent = `${name}: red raises its score`;
    figure.hidden = false;
    tell(`${name} is below the table.`);
    figure.scrollIntoView({ block: "nearest" });
  };

  const byFile = async () => {
    const file = one("#file").files[0];
    if (file === undefined) { complain("Choose an image file first."); one("#file").focus(); return; }
    tell("Looking for images like yours; the first search loads the model.");
    const answer = await send("/query-image" + location.search, file, "application/octet-stream");
    if (answer.ok) location.assign(answer.location); else complain(answer.error);
  };

  const form = one("#verdict");
  const reviewerForm = one("#reviewer");
  const labels = form === null ? [] : Array.from(form.querySelectorAll("[data-label]"));
  const meanwhile = one("#meanwhile");
  const states = { "": ["not said", "yes"], yes: ["yes", "no"], no: ["no", ""] };
  let refused = null; // the decision that somebody else was faster with
  let busy = false;

  const setReviewer = async () => {
    const box = one("#reviewer-name");
    const answer = await send("/reviewer", JSON.stringify({ name: box.value }));
    if (!answer.ok) { complain(answer.error); return false; }
    localStorage.setItem("reviewer", answer.reviewer);
    box.value = box.defaultValue = answer.reviewer;
    tell(answer.message);
    return true;
  };

  // What a page shows of labels is what one reviewer said: for another it is loaded anew.
  const changeReviewer = async () => {
    if (busy) return;
    busy = true;
    const before = one("#reviewer-name").defaultValue;
    try {
      if (!(await setReviewer()) || one("#reviewer-name").value === before) return;
      later(told.textContent);
      location.reload();
    } finally { busy = false; }
  };

  const decide = async (decision) => {
    if (busy || form.dataset.image === "") return;
    busy = true;
    try {
      const box = one("#reviewer-name");
      if (box.value !== box.defaultValue && !(await setReviewer())) { box.focus(); return; }
      const value = { yes: true, no: false, "": null };
      const pressed = labels.filter((button) => button.dataset.pressed !== undefined);
      const body = {
        image_id: form.dataset.image, content_hash: form.dataset.hash, reviewer: box.value, seen: form.dataset.seen,
        labels: Object.fromEntries(pressed.map((button) => [button.dataset.label, value[button.dataset.said]])),
        decision, reason: one("#reason").value || null,
      };
      const answer = await send("/verdict", JSON.stringify(body));
      if (answer.ok) {
        later(answer.message);
        if (form.dataset.next !== "" && decision !== null) location.assign(form.dataset.next); else location.reload();
      } else if (answer.seen !== undefined) {
        refused = { decision, seen: answer.seen };
        one("#meanwhile-text").textContent = answer.error;
        meanwhile.hidden = false;
        one("#keep-theirs").focus();
      } else {
        complain(answer.error);
        if (box.value.trim() === "") box.focus();
      }
    } finally { busy = false; }
  };

  const undo = async () => {
    if (busy) return;
    busy = true;
    let answer;
    try { answer = await send("/undo", "{}"); } finally { busy = false; }
    if (!answer.ok) { complain(answer.error); return; }
    later(answer.message);
    const queue = one("#queue") || one("#verdict[data-image='']");
    if (queue === null || answer.image_id === form.dataset.image) { location.reload(); return; }
    const place = new URL(location.href);
    place.searchParams.delete("after");
    place.searchParams.set("at", answer.image_id);
    location.assign(place);
  };

  const toggle = (button) => {
    const next = states[button.dataset.said][1];
    button.dataset.said = next;
    button.dataset.pressed = "";
    one("b", button).textContent = states[next][0];
    tell(`${button.dataset.label}: ${states[next][0]}`);
  };

  document.addEventListener("click", (event) => {
    const button = event.target instanceof Element ? event.target.closest("button") : null;
    if (button === null) return;
    if (button.matches(".reveal")) reveal(button);
    else if (button.dataset.map !== undefined) drawMap(button);
    else if (button.dataset.decision !== undefined) decide(button.dataset.decision);
    else if (button.dataset.label !== undefined) toggle(button);
    else if (button.id === "labels-only") decide(null);
    else if (button.id === "undo") undo();
    else if (button.id === "by-file") byFile();
    else if (button.id === "keep-theirs") {
      later("Left as it was decided.");
      if (form.dataset.next !== "") location.assign(form.dataset.next); else location.reload();
    }
    else if (button.id === "take-mine") {
      form.dataset.seen = refused.seen;
      meanwhile.hidden = true;
      decide(refused.decision);
    }
  });

  if (reviewerForm !== null) {
    const box = one("#reviewer-name");
    reviewerForm.addEventListener("submit", (event) => {
      event.preventDefault();
      changeReviewer();
    });
    const known = localStorage.getItem("reviewer");
    if (box.value === "" && known) { box.value = known; changeReviewer(); }
  }

  // Single keys, where they are wanted and nothing is being written.
  const keys = one("#keys");
  if (keys !== null) {
    keys.checked = localStorage.getItem("keys") !== "off";
    keys.addEventListener("change", () => localStorage.setItem("keys", keys.checked ? "on" : "off"));
  }
  const acts = {
    a: () => decide("allow"), r: () => decide("review"), b: () => decide("block"), u: undo, l: () => decide(null),
    n: () => one("#skip").click(), j: () => one("#skip").click(),
    p: () => one("#back")?.click(), k: () => one("#back")?.click(),
    s: () => { const button = one(".pic.large .reveal"); if (button !== null) reveal(button); },
  };
  document.addEventListener("keydown", (event) => {
    if (one("#queue") === null && one("#verdict[data-image='']") === null) return;
    if (keys !== null && !keys.checked) return;
    if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.repeat) return;
    if (event.target instanceof Element && event.target.matches("input:not([type=checkbox]), select, textarea")) return;
    if (meanwhile !== null && !meanwhile.hidden) return;
    const key = event.key.toLowerCase();
    if (one("#queue") === null && key !== "u") return;
    const number = Number(key);
    const act = key >= "1" && key <= "9" && number <= labels.length ? () => toggle(labels[number - 1]) : acts[key];
    if (act === undefined) return;
    event.preventDefault();
    act();
  });
})();
