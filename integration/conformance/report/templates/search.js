const box = document.getElementById("search");
const cases = [...document.querySelectorAll(".case")].map(
  element => ({ element, text: element.textContent.toLowerCase() }));
function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const { element, text } of cases) {
    element.hidden = !words.every(word => text.includes(word));
    count += !element.hidden;
  }
  for (const group of document.querySelectorAll(".group"))
    group.hidden = words.length > 0 && !group.querySelector(".case:not([hidden])");
  document.getElementById("shown").textContent = `${count} of ${cases.length} entries`;
}
function follow() {
  const name = location.hash.slice(1);
  if (name.startsWith("search=")) box.value = new URLSearchParams(name).get("search");
  const target = document.getElementById(name);
  if (target && target.tagName === "DETAILS") target.open = true;
  search();
}
box.addEventListener("input", search);
addEventListener("hashchange", follow);
follow();
